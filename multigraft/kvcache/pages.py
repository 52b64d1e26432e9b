"""KV pages: who holds which, and which of them hold prompt prefixes that can be used again. No tensors."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from multigraft.core.request import Request

Namespace = tuple[tuple[int, str], int] | None
"""(AdapterRef.cache_key, first adapted position); None where only the base model acted."""

ROOT = 0
"""Parent of a sequence's first page."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One full page in the prefix index."""

    id: int
    page: int
    namespace: Namespace
    key: tuple[int, tuple[int, ...]]
    """(id of the preceding page's entry, the page's tokens)."""


class PagePool:
    """Reference-counted KV pages of `page_size` tokens with a prefix index over the full ones.

    A page is free, cached (indexed, held by nobody, oldest first in line for eviction) or held. The index maps
    (parent entry, tokens) to a page inside a namespace; a page before the first adapted position is the base model's,
    whoever computed it, so a parent may lie in another namespace than its child. Entry ids are never reused and keys
    are compared whole, so equal keys mean equal token sequences from position 0: a hash collision cannot serve wrong
    KV.

    Pages freed while a step still reads them may be handed out at once: steps run in order, so the new holder's
    writes come after those reads.
    """

    def __init__(self, num_pages: int, page_size: int, enable_prefix_caching: bool = True):
        assert num_pages > 0 and page_size > 0
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_queries = 0
        """Tokens looked up in the prefix index at admissions."""
        self.num_hits = 0
        """Tokens found there."""
        self._refs = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._index: dict[Namespace, dict[tuple[int, tuple[int, ...]], _Entry]] = {}
        self._entries: dict[int, _Entry] = {}  # by page
        self._last_id = ROOT

    @property
    def num_free(self) -> int:
        """Pages that can be handed out; cached ones count, for they are evicted on demand."""
        return len(self._free) + len(self._cached)

    @property
    def usage(self) -> float:
        """Share of the pages held by requests."""
        return 1.0 - self.num_free / self.num_pages

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def match(self, request: Request) -> list[int]:
        """Cached pages of the longest known prefix, full pages only; at least one token is left to compute."""
        return [entry.page for entry in self._match(request)]

    def allocate(self, request: Request, reserve: int = 0) -> bool:
        """Give a request without pages all the pages of its tokens, those of its cached prefix included.

        Sets pages and num_computed. False, and nothing changed, unless `reserve` pages stay free beyond these.
        """
        assert not request.pages
        entries = self._match(request)
        unused = sum(self._refs[entry.page] == 0 for entry in entries)
        fresh = self.pages_for(len(request.tokens)) - len(entries)
        if self.num_free - unused < fresh + reserve:
            return False
        for entry in entries:
            if self._refs[entry.page] == 0:
                del self._cached[entry.page]
            self._refs[entry.page] += 1
        request.pages = [entry.page for entry in entries] + [self._take() for _ in range(fresh)]
        request.page_keys = [entry.id for entry in entries]
        request.num_computed = len(entries) * self.page_size
        if self.enable_prefix_caching and request.use_prefix_cache:
            self.num_queries += len(request.tokens)
            self.num_hits += request.num_computed
        return True

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Make the request's pages cover num_tokens positions; False, and nothing changed, when pages are short."""
        need = self.pages_for(num_tokens) - len(request.pages)
        if need > self.num_free:
            return False
        request.pages += [self._take() for _ in range(need)]
        return True

    def publish(self, request: Request) -> None:
        """Index the request's full pages whose KV is computed by now.

        A page whose content is indexed already, computed by two requests at a time, stays outside.
        """
        size, keys = self.page_size, request.page_keys
        full = min(request.num_computed, request.cacheable) // size
        if not self.enable_prefix_caching:
            return
        for i in range(len(keys), full):
            namespace = self._namespace(request, i)
            index = self._index.setdefault(namespace, {})
            key = (keys[-1] if keys else ROOT, tuple(request.tokens[i * size : (i + 1) * size]))
            entry = index.get(key)
            if entry is None:
                self._last_id += 1
                entry = _Entry(self._last_id, request.pages[i], namespace, key)
                index[key] = self._entries[entry.page] = entry
            keys.append(entry.id)

    def free(self, request: Request) -> None:
        """Take all pages from a request; indexed ones stay cached until they are needed."""
        for page in reversed(request.pages):  # a prefix outlives what follows it
            self._refs[page] -= 1
            if self._refs[page] == 0:
                if page in self._entries:
                    self._cached[page] = None
                else:
                    self._free.append(page)
        request.pages = []
        request.page_keys = []
        request.num_computed = 0

    def check_integrity(self, requests: Iterable[Request] | None = None) -> None:
        """Assert the pool's invariants; with the requests that hold pages, also that the counts are theirs."""
        held = [page for page in range(self.num_pages) if self._refs[page]]
        assert all(refs >= 0 for refs in self._refs)
        parts = [*self._free, *self._cached, *held]
        assert sorted(parts) == list(range(self.num_pages)), "a page is free, cached or held: exactly one"
        assert all(page in self._entries for page in self._cached)
        assert not any(page in self._entries for page in self._free)
        indexed = [entry for index in self._index.values() for entry in index.values()]
        assert len(indexed) == len(self._entries)
        for entry in indexed:
            assert self._entries[entry.page] is entry and self._index[entry.namespace][entry.key] is entry
            assert len(entry.key[1]) == self.page_size
        if requests is not None:
            counts = Counter(page for request in requests for page in request.pages)
            assert all(self._refs[page] == counts[page] for page in range(self.num_pages)), "reference counts"

    def _match(self, request: Request) -> list[_Entry]:
        entries: list[_Entry] = []
        if not self._index or not request.use_prefix_cache:
            return entries
        size, tokens, parent = self.page_size, request.tokens, ROOT
        for i in range(min(request.cacheable, len(tokens) - 1) // size):
            index = self._index.get(self._namespace(request, i))
            entry = index.get((parent, tuple(tokens[i * size : (i + 1) * size]))) if index else None
            if entry is None:
                break
            entries.append(entry)
            parent = entry.id
        return entries

    def _namespace(self, request: Request, page: int) -> Namespace:
        """Of the request's page at this place. What acts after the first adapted position follows from the key."""
        if request.adapter is None or not request.adapted:
            return None
        first = request.adapted[0][0]
        return (request.adapter.cache_key, first) if first < (page + 1) * self.page_size else None

    def _take(self) -> int:
        """A page for one holder, the longest unused cached one if none is free."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            entry = self._entries.pop(page)
            index = self._index[entry.namespace]
            del index[entry.key]
            if not index:
                del self._index[entry.namespace]
        self._refs[page] = 1
        return page
