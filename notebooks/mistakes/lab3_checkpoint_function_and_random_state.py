"""Typical mistakes in lab 3."""

from notebooks.mistake import Mistake

CHECKPOINT, PRESERVING, SWITCH = "checkpoint", "preserving", "switch"

MISTAKES = [
    Mistake(
        "what is kept is not scaled",
        "dropout",
        "test_dropout",
        "return x * mask / (1 - self.p), mask",
        "return x * mask, mask",
        "Dropout(0.3): y: what is kept has to be divided by 1 - p",
    ),
    Mistake(
        "kept and dropped exchanged",
        "dropout",
        "test_dropout",
        ">= self.p",
        "< self.p",
        "kept and dropped are exchanged",
    ),
    Mistake(
        "mask redrawn in backward",
        "dropout",
        "test_dropout",
        "return dy * saved / (1 - self.p)",
        "return dy * (STREAM.random(dy.shape) >= self.p) / (1 - self.p)",
        "dx: the mask is drawn anew; backward needs that of forward",
    ),
    Mistake(
        "drops in evaluation",
        "dropout",
        "test_dropout",
        "if not self.training:",
        "if not self.p:",
        "in evaluation: y: it still drops",
    ),
    Mistake(
        "the input kept in the layer",
        CHECKPOINT,
        "test_checkpoint",
        "        return y, x\n\n    def backward(self, dy, saved):\n"
        '        """The gradient at the input; adds the gradients of inner\'s parameters."""\n'
        "        _, kept = self.inner.forward(saved)",
        "        self.x = x\n        return y, None\n\n    def backward(self, dy, saved):\n"
        "        _, kept = self.inner.forward(self.x)",
        "keep x in saved, not in self",
    ),
    Mistake(
        "the backward pass of inner forgotten",
        CHECKPOINT,
        "test_checkpoint",
        "        return self.inner.backward(dy, kept)",
        "        return dy",
        "has no gradient: nobody called its layer's backward",
    ),
    Mistake(
        "what inner saved is kept",
        CHECKPOINT,
        "test_checkpoint_costs",
        "        y, _ = self.inner.forward(x)\n        return y, x\n\n    def backward(self, dy, saved):\n"
        '        """The gradient at the input; adds the gradients of inner\'s parameters."""\n'
        "        _, kept = self.inner.forward(saved)",
        "        return self.inner.forward(x)\n\n    def backward(self, dy, kept):",
        "inner is not run again: you keep what it saved",
    ),
    Mistake(
        "the state noted after the first run",
        PRESERVING,
        "test_preserving",
        "        y, _ = self.inner.forward(x)\n        return y, (x, state)",
        "        y, _ = self.inner.forward(x)\n        return y, (x, STREAM.bit_generator.state)",
        "you note the state when inner has drawn; note it before",
    ),
    Mistake(
        "the state not put back for the second run",
        PRESERVING,
        "test_preserving",
        "        STREAM.bit_generator.state = state\n",
        "",
        "the second run draws what comes next in the stream: the state is not put back before it",
    ),
    Mistake(
        "the stream not put back afterwards",
        PRESERVING,
        "test_stream",
        "STREAM.bit_generator.state = now",
        "pass",
        "so the next step draws numbers that were drawn already",
    ),
    Mistake(
        "the least memory for the fewest flops",
        "choose",
        "test_choose",
        "min(fitting, key=lambda chosen: flops_again(parts, chosen))",
        "min(fitting, key=lambda chosen: most_inside(parts, chosen))",
        "You take what needs the least memory",
    ),
    Mistake(
        "largest first",
        "choose",
        "test_choose",
        "    return list(min(fitting",
        "    chosen = []\n"
        "    for index in sorted(indices, key=lambda index: -parts[index].inside):\n"
        "        if most_inside(parts, chosen) > budget:\n"
        "            chosen.append(index)\n"
        "    return sorted(chosen)\n"
        "    return list(min(fitting",
        "Do you take the largest parts first, until it fits?",
    ),
    Mistake(
        "a budget that is just enough refused",
        "choose",
        "test_choose",
        "most_inside(parts, chosen) <= budget",
        "most_inside(parts, chosen) < budget",
        "170 bytes are not more than 170: that fits, too",
    ),
    Mistake(
        "the word as it is",
        SWITCH,
        "test_switch",
        'return word.lower() == "true"',
        "return bool(word)",
        'bool("False") is True, as is that of every word but the empty one',
    ),
    Mistake(
        "any word accepted",
        SWITCH,
        "test_switch",
        'if word.lower() not in ("true", "false"):',
        "if not word:",
        "use_checkpoint(['maybe']): expected a ValueError, got False",
    ),
]
