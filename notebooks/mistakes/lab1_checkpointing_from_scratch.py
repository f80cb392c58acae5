"""Typical mistakes in lab 1."""

from notebooks.mistake import Mistake

LAYER, SEGMENT, BACKPROP = "layer_backward", "forward_between_checkpoints", "backprop"

MISTAKES = [
    Mistake(
        "missing transpose",
        LAYER,
        "test_layer_backward",
        "w.T @ dz",
        "w @ dz",
        "gradient_in: it is computed with W, where its transpose is asked",
    ),
    Mistake(
        "weights gradient transposed",
        LAYER,
        "test_layer_backward",
        "dz @ a_in.T",
        "a_in @ dz.T",
        "nabla_w: it is the transpose of the right one",
    ),
    Mistake(
        "wrong derivative",
        LAYER,
        "test_layer_backward",
        "a_out * (1 - a_out)",
        "a_out",
        "the factor (1 - a_out) of the sigmoid's derivative is missing",
    ),
    Mistake(
        "mean for sum",
        LAYER,
        "test_layer_backward",
        "dz.sum(",
        "dz.mean(",
        "nabla_b: it is 1/6 times the right one: did you take the mean where the sum is asked (batch 6)?",
    ),
    Mistake(
        "gradient changed in place",
        LAYER,
        "test_layer_backward",
        "dz = gradient * (a_out * (1 - a_out))",
        "gradient *= a_out * (1 - a_out); dz = gradient",
        "your code changes gradient",
    ),
    Mistake(
        "the input counted",
        "activation_bytes",
        "test_activation_bytes",
        "sizes[1:]",
        "sizes",
        "You count a_0, which is the caller's",
    ),
    Mistake(
        "layer index off by one",
        SEGMENT,
        "test_forward_between_checkpoints",
        "range(checkpoint_idx_start, layer_idx_end)",
        "range(checkpoint_idx_start + 1, layer_idx_end + 1)",
        "the index is off by one",
    ),
    Mistake(
        "the checkpoint itself left out",
        SEGMENT,
        "test_forward_between_checkpoints",
        "return activations",
        "return activations[1:]",
        "expected 4 arrays, got 3: the first is missing",
    ),
    Mistake(
        "checkpoint index off by one",
        BACKPROP,
        "test_gradients",
        "if (i + 1) % n == 0:\n                checkpoints[i + 1] = a",
        "if i % n == 0:\n                checkpoints[i] = a if i else x\n"
        "            if i == last - 1:\n                checkpoints[last] = a",
        "is the segment restored from the checkpoint",
    ),
    Mistake(
        "gradients in reverse order",
        BACKPROP,
        "test_gradients",
        "            behind = segment.pop()",
        "            behind = segment.pop()\n        nabla_b.reverse()\n        nabla_w.reverse()",
        "the list is in reverse order",
    ),
    Mistake(
        "checkpoints recomputed",
        BACKPROP,
        "test_forwards",
        "start, end - 1)\n                segment.append(behind)",
        "start, end)",
        "you recompute the last layer of each segment, whose output is the next checkpoint: "
        "48 recomputed forwards, 42 suffice",
    ),
    Mistake(
        "last segment recomputed",
        BACKPROP,
        "test_forwards",
        "        segment = self.forward_between_checkpoints(checkpoints.pop(last), last, depth)\n",
        "        segment = self.forward_between_checkpoints(checkpoints[last], last, depth)\n"
        "        segment = self.forward_between_checkpoints(checkpoints.pop(last), last, depth)\n",
        "you recompute the last segment, which can be kept from the forward pass: 44 recomputed forwards",
    ),
    Mistake(
        "restored segments not freed",
        BACKPROP,
        "test_peak",
        "a_out = segment.pop()\n",
        "a_out = segment.pop()\n                checkpoints[f'used {i}'] = a_out\n",
        "nearly every activation is alive at once",
    ),
    Mistake(
        "last layer of each segment counted",
        "formulae",
        "test_formulae",
        "return (n - 1) * ((depth - 1) // n)",
        "return n * ((depth - 1) // n)",
        "You run the last layer of each segment again",
    ),
    Mistake(
        "only the end of the forward pass",
        "formulae",
        "test_formulae",
        "return max(with_last_segment, with_segment_before)",
        "return with_last_segment",
        "When a segment is restored there is more",
    ),
]
