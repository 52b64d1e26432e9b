"""Models that can be read: linear, a shallow tree, a list of rules; fitted with scikit-learn, kept as plain numbers.

Each predicts one number from named features and says why. Predicting needs no scikit-learn and takes microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .placement import Array

MAX_DEPTH = 4
MAX_RULES = 8
MIN_LEAF = 8
"""Examples that a leaf or rule must cover."""


class Model(Protocol):
    def predict(self, x: Sequence[float]) -> float: ...

    def why(self, x: Sequence[float]) -> str:
        """The part of the model that decided."""
        ...


@dataclass(frozen=True, slots=True)
class Linear:
    names: tuple[str, ...]
    weights: tuple[float, ...]
    intercept: float

    @classmethod
    def fit(cls, names: Sequence[str], x: Array, y: Array) -> Linear:
        """Ridge regression on standardised features."""
        from sklearn.linear_model import RidgeCV

        mean, scale = x.mean(axis=0), x.std(axis=0)
        scale[scale == 0] = 1
        model = RidgeCV(alphas=np.logspace(-4, 3, 15)).fit((x - mean) / scale, y)
        weights = model.coef_ / scale
        return cls(tuple(names), tuple(map(float, weights)), float(model.intercept_ - weights @ mean))

    def predict(self, x: Sequence[float]) -> float:
        return self.intercept + sum(w * v for w, v in zip(self.weights, x, strict=True))

    def why(self, x: Sequence[float]) -> str:
        parts = sorted(zip(self.names, self.weights, x, strict=True), key=lambda p: -abs(p[1] * p[2]))
        return " ".join([f"{self.intercept:.3g}", *(f"{w * v:+.3g} ({name} = {v:.3g})" for name, w, v in parts[:4])])


@dataclass(frozen=True, slots=True)
class Node:
    """A leaf when `feature` is None; else `left` where the feature is at most the threshold."""

    value: float
    feature: str | None = None
    index: int = 0
    threshold: float = 0.0
    left: Node | None = None
    right: Node | None = None


@dataclass(frozen=True, slots=True)
class Tree:
    root: Node

    @classmethod
    def fit(cls, names: Sequence[str], x: Array, y: Array) -> Tree:
        from sklearn.tree import DecisionTreeRegressor

        grown = DecisionTreeRegressor(max_depth=MAX_DEPTH, min_samples_leaf=MIN_LEAF, random_state=0).fit(x, y).tree_

        def node(k: int) -> Node:
            value = float(grown.value[k].ravel()[0])
            if grown.children_left[k] < 0:
                return Node(value)
            i = int(grown.feature[k])
            children = node(grown.children_left[k]), node(grown.children_right[k])
            return Node(value, names[i], i, float(grown.threshold[k]), *children)

        return cls(node(0))

    def predict(self, x: Sequence[float]) -> float:
        return self._path(x)[-1].value

    def why(self, x: Sequence[float]) -> str:
        *inner, leaf = self._path(x)
        tests = [f"{n.feature} {'≤' if x[n.index] <= n.threshold else '>'} {n.threshold:.3g}" for n in inner]
        return f"{' and '.join(tests) or 'always'}: {leaf.value:.3g}"

    def _path(self, x: Sequence[float]) -> list[Node]:
        path = [self.root]
        while (node := path[-1]).feature is not None:
            child = node.left if x[node.index] <= node.threshold else node.right
            assert child is not None
            path.append(child)
        return path


@dataclass(frozen=True, slots=True)
class Rule:
    """The value where a feature is at most (or above) a threshold."""

    feature: str
    index: int
    below: bool
    threshold: float
    value: float

    def holds(self, x: Sequence[float]) -> bool:
        return (x[self.index] <= self.threshold) == self.below

    def __str__(self) -> str:
        return f"{self.feature} {'≤' if self.below else '>'} {self.threshold:.3g}: {self.value:.3g}"


@dataclass(frozen=True, slots=True)
class RuleList:
    """The first rule that holds decides; `default` where none does."""

    rules: tuple[Rule, ...]
    default: float

    @classmethod
    def fit(cls, names: Sequence[str], x: Array, y: Array) -> RuleList:
        """Each rule is the better side of the best single split of the examples that no rule before it covers."""
        from sklearn.tree import DecisionTreeRegressor

        rules: list[Rule] = []
        while len(rules) < MAX_RULES and len(y) >= 2 * MIN_LEAF and np.ptp(y) > 0:
            stump = DecisionTreeRegressor(max_depth=1, min_samples_leaf=MIN_LEAF, random_state=0).fit(x, y).tree_
            if stump.node_count == 1:
                break
            i, threshold = int(stump.feature[0]), float(stump.threshold[0])
            below = x[:, i] <= threshold
            covered = below if y[below].std() <= y[~below].std() else ~below
            rules.append(Rule(names[i], i, covered is below, threshold, float(y[covered].mean())))
            x, y = x[~covered], y[~covered]
        return cls(tuple(rules), float(y.mean()))

    def predict(self, x: Sequence[float]) -> float:
        rule = self._deciding(x)
        return self.default if rule is None else rule.value

    def why(self, x: Sequence[float]) -> str:
        rule = self._deciding(x)
        return f"no rule holds: {self.default:.3g}" if rule is None else str(rule)

    def _deciding(self, x: Sequence[float]) -> Rule | None:
        return next((rule for rule in self.rules if rule.holds(x)), None)


KINDS: dict[str, type[Linear] | type[Tree] | type[RuleList]] = {"linear": Linear, "tree": Tree, "rules": RuleList}


def fit_best(names: Sequence[str], x: Array, y: Array, folds: int = 5) -> tuple[str, Model, float]:
    """Kind, model and mean absolute error in cross-validation of the kind that does best there."""
    order = np.random.default_rng(0).permutation(len(y))
    errors: dict[str, float] = {}
    for kind, cls in KINDS.items():
        total = 0.0
        for held_out in np.array_split(order, folds):
            rest = np.setdiff1d(order, held_out)
            model = cls.fit(names, x[rest], y[rest])
            total += sum(abs(model.predict(x[i]) - y[i]) for i in held_out)
        errors[kind] = total / len(y)
    kind = min(errors, key=errors.__getitem__)
    return kind, KINDS[kind].fit(names, x, y), errors[kind]
