"""Typical mistakes in lab 4."""

from notebooks.mistake import Mistake

ACCUMULATE, EPOCH, STEPS = "accumulate", "train_epoch", "accumulation_steps_for"

MISTAKES = [
    Mistake(
        "gradients simply added",
        "combine",
        "test_combine",
        "gradient * (size / samples)",
        "gradient",
        "the loss is not scaled",
    ),
    Mistake(
        "mean of means",
        "combine",
        "test_combine",
        "gradient * (size / samples)",
        "gradient / len(sizes)",
        "every *sample* has to count the same",
    ),
    Mistake(
        "not divided by the samples",
        "combine",
        "test_combine",
        "(size / samples)",
        "size",
        "did you take the sum where the mean is asked (batch 12)?",
    ),
    Mistake(
        "loss not scaled",
        ACCUMULATE,
        "test_accumulate",
        "share = len(x) / samples",
        "share = 1.0",
        "the loss is not scaled (3 times too large, about)",
    ),
    Mistake(
        "scaled by the number of micro-batches",
        ACCUMULATE,
        "test_accumulate",
        "    for x, y in micro_batches:\n        share = len(x) / samples",
        "    micro_batches = list(micro_batches)\n    for x, y in micro_batches:\n"
        "        share = 1 / len(micro_batches)",
        "every micro-batch counts the same (1/K), but they have different sizes",
    ),
    Mistake(
        "old gradients not forgotten",
        ACCUMULATE,
        "test_accumulate",
        "parameter.gradient = None",
        "pass",
        "what was in `gradient` before is still in it",
    ),
    Mistake(
        "activations held by a name",
        ACCUMULATE,
        "test_accumulate_peak",
        "        del saved  # or these activations would be alive while the next ones are computed\n",
        "",
        "are still alive while the next one runs forward",
    ),
    Mistake(
        "partial window forgotten",
        EPOCH,
        "test_train_epoch",
        "range(0, len(x), window)",
        "range(0, len(x) - window + 1, window)",
        "the partial window at the end, 8 samples, is not used for an update: 1 updates, 2 are needed",
    ),
    Mistake(
        "partial window divided by a full one",
        EPOCH,
        "test_train_epoch",
        "micro_batches, end - start)",
        "micro_batches, window)",
        "the partial window of 8 samples was divided by the full window's 12: its step is too short",
    ),
    Mistake(
        "an update after every micro-batch",
        EPOCH,
        "test_train_epoch",
        "batch_size * accumulation_steps",
        "batch_size",
        "you update after every micro-batch: 6 updates, 2 suffice",
    ),
    Mistake(
        "rounded down",
        STEPS,
        "test_accumulation_steps_for",
        "-(-samples // rows)",
        "max(1, samples // rows)",
        "Round up, not down",
    ),
    Mistake(
        "fixed bytes left out",
        STEPS,
        "test_accumulation_steps_for",
        "(budget - fixed_bytes) // bytes_per_sample",
        "budget // bytes_per_sample",
        "You leave out the fixed bytes",
    ),
]
