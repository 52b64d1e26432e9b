"""What `make run` does: serve the embedded model with the example adapters, ask all of them at once, show the answers.

python examples/demo.py            # leaves the server running until Ctrl-C
python examples/demo.py --once     # stops it afterwards
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from multigraft.core.errors import MultigraftError
from multigraft.models.gguf import packaged_smollm2

ADAPTERS = Path(__file__).parent / "adapters"
BASE = "smollm2"
PROMPTS = ("Who wrote Romeo and Juliet?", "How do I make a cup of coffee?", "What should I eat for breakfast?")
BURST = 32  # requests
BURST_TOKENS = 64  # of output for each of them
START_LIMIT_S = 300.0
console = Console()


class ServerFailed(Exception):
    """The server ended or did not come up; the message says why."""


class Server:
    """`multigraft serve` as a subprocess, with its log in a file."""

    def __init__(self, port: int, log: Path):
        self.url, self.log = f"http://127.0.0.1:{port}", log
        # --lora-dir would register the same folders; naming them one by one shows what a user would type.
        modules = ["--lora-modules", *(f"{path.name}={path}" for path in adapter_folders())]
        command = [str(Path(sys.executable).with_name("multigraft")), "serve", str(packaged_smollm2())]
        with log.open("wb") as out:
            # A session of its own: Ctrl-C reaches this process only, which then stops the server in order.
            self.process = subprocess.Popen(
                [*command, "--served-model-name", BASE, "--port", str(port), *modules],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_healthy(self) -> None:
        start = time.monotonic()
        with console.status("") as status:
            while (waited := time.monotonic() - start) < START_LIMIT_S:
                if self.process.poll() is not None:
                    raise ServerFailed(f"The server ended with code {self.process.returncode}:\n{self.log_tail()}")
                try:
                    urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
                    return
                except OSError:  # nobody listens yet, or it answers 503 while it loads
                    last = (self.log_tail(1) or "…")[: console.width - 30]
                    status.update(f"Starting the server, {waited:.0f} s  [dim]{last}[/dim]")
                    time.sleep(0.25)
        raise ServerFailed(f"The server did not come up in {START_LIMIT_S:.0f} s:\n{self.log_tail()}")

    def log_tail(self, lines: int = 20) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
        return "\n".join(text.strip().splitlines()[-lines:])

    def chat(self, model: str, prompt: str, **options: Any) -> dict[str, Any]:
        """POST /v1/chat/completions; the reply as it came."""
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], **options}
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as e:
            raise ServerFailed(f"{model} answered {e.code}: {e.read().decode(errors='replace')}") from e
        except OSError as e:  # it died, or said nothing for two minutes
            raise ServerFailed(f"No answer from {model} ({e}). The server's last words:\n{self.log_tail()}") from e

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=40)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                self.process.kill()
                self.process.wait()


def adapter_folders() -> list[Path]:
    return sorted(path for path in ADAPTERS.iterdir() if (path / "adapter_config.json").is_file())


def free_port(wanted: int) -> int:
    """wanted, or any free port when somebody listens there."""
    for port in (wanted, 0):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return s.getsockname()[1]
    raise ServerFailed("No free port on 127.0.0.1.")


def show_answers(server: Server, models: list[str], pool: ThreadPoolExecutor) -> None:
    """Every prompt to every model, all in flight together, so that the engine mixes them in its batches."""
    jobs = {
        (model, prompt): pool.submit(server.chat, model, prompt, temperature=0, max_tokens=48)
        for model in models
        for prompt in PROMPTS
    }
    table = Table("model", *PROMPTS, title="The same questions, one base model, all in the same batch", show_lines=True)
    for model in models:
        answers = [jobs[model, prompt].result()["choices"][0]["message"]["content"] for prompt in PROMPTS]
        table.add_row(f"[bold]{model}[/bold]", *(answer.strip().replace("[", r"\[") for answer in answers))
    console.print(table)


def show_throughput(server: Server, models: list[str], pool: ThreadPoolExecutor) -> None:
    def ask(i: int) -> int:
        prompt = f"Write a long story about the number {i}."
        reply = server.chat(models[i % len(models)], prompt, seed=i, max_tokens=BURST_TOKENS, ignore_eos=True)
        return reply["usage"]["completion_tokens"]

    start = time.perf_counter()
    with console.status(f"{BURST} requests at once…"):
        tokens = sum(pool.map(ask, range(BURST)))
    seconds = time.perf_counter() - start
    console.print(
        f"\n{BURST} requests at once over {len(models)} models: {tokens} tokens in {seconds:.1f} s, "
        f"[bold]{tokens / seconds:.0f} tokens/s[/bold].\n"
    )


def curl_line(url: str) -> str:
    body = {"model": "pirate", "messages": [{"role": "user", "content": "Tell me about the moon."}], "temperature": 0}
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


def main(
    port: Annotated[int, typer.Option(help="Port of the server; another is taken when it is busy.")] = 8000,
    once: Annotated[bool, typer.Option("--once", help="Stop the server after the demonstration.")] = False,
) -> None:
    """Serve SmolLM2-135M-Instruct with the example adapters and show what each of them answers."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, and stops the server too
    models = [BASE, *(path.name for path in adapter_folders())]
    with ExitStack() as stack:
        try:
            chosen = free_port(port)
            if chosen != port:
                console.print(f"Port {port} is busy; using {chosen}.")
            log = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="multigraft-"))) / "server.log"
            server = Server(chosen, log)
            stack.callback(server.stop)
            console.print(f"Serving {BASE} with adapters {', '.join(models[1:])}; log in {log}")
            server.wait_until_healthy()
            pool = stack.enter_context(ThreadPoolExecutor(BURST))
            show_answers(server, models, pool)
            show_throughput(server, models, pool)
            if once:
                return
            console.print(f"The server runs at {server.url}; Ctrl-C stops it. Try:\n")
            console.print(curl_line(server.url), soft_wrap=True, highlight=False, markup=False)
            if code := server.process.wait():
                raise ServerFailed(f"The server ended with code {code}:\n{server.log_tail()}")
        except KeyboardInterrupt:
            console.print("\nStopping the server…")
        except (ServerFailed, MultigraftError) as e:
            console.print(str(e), style="red", markup=False)
            raise typer.Exit(1) from e


if __name__ == "__main__":
    typer.run(main)
