"""What `load` does, step by step: open, plan, load, verify. Prints what each step knows.

python examples/inside.py smollm2
"""

from __future__ import annotations

import sys

import loadstone


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else "smollm2"

    # open and plan: headers only, torch is not even imported
    identity = loadstone.open_source(source)
    print(f"{identity.checkpoint.format} with {len(identity.checkpoint.tensors)} tensors")
    print(f"{identity.weight_map.name}, config from {identity.config_source}")
    step = next(step for step in identity.plan.steps if step.ops)
    print(f"for example {step.source} {step.source_shape} -> {step.targets} by {[op.label for op in step.ops]}")
    identity.plan.require_clean(source)  # raises, naming every problem, unless the plan is without fault

    # load: one tensor at a time; where the ops are views, the parameters are the mapped file
    model = loadstone.load_model(identity)
    tokenizer = loadstone.load_tokenizer_for(identity)

    # verify: undo the ops and compare with the file bit for bit, then score English
    for check in loadstone.verify(identity, model, tokenizer).checks:
        print({True: "yes", False: "NO", None: "-"}[check.ok], check.name, "|", check.detail)


if __name__ == "__main__":
    main()
