"""A causal language model, self-distilled by the stock Trainer on packed texts; generate() stays what it was.

    python examples/train_lm.py   # half a minute on one CPU core; nothing is downloaded

A Llama of 100 thousand weights, drawn at random, learns the characters of Python's own help texts. Each batch
packs many paragraphs into one row without padding, and each cycle keeps them apart as the model does. What is
saved is an ordinary checkpoint: stock transformers must write the same text from it.

So little training gives no sentence worth reading, and no plain training stands beside it: this shows how the
pieces fit, not that they pay off.
"""

import argparse
from itertools import chain, count
from pathlib import Path
from pydoc_data.topics import topics

import torch
from sklearn.model_selection import train_test_split
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from cyclekd import run_cycles, unwrap_multicycle, wrap_multicycle

END = 0  # the character that no text contains ends every paragraph


def main():
    args = parse_arguments()
    torch.set_num_threads(1)  # enough for matrices this small, and steady where other work shares the cores
    train, test = train_test_split(paragraphs(), test_size=32, random_state=0)
    pack = DataCollatorWithFlattening()  # one row; the positions start anew with each paragraph

    set_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    ids = {"vocab_size": 128, "bos_token_id": END, "eos_token_id": END, "pad_token_id": END}
    model = LlamaForCausalLM(LlamaConfig(**size, **ids, max_position_embeddings=256))
    model = wrap_multicycle(model, cycles=args.cycles)  # <- the new line: the loss covers all cycles

    settings = TrainingArguments(
        output_dir=args.out / "checkpoints",
        max_steps=args.steps,
        per_device_train_batch_size=8,  # paragraphs in a row
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    Trainer(model, settings, train_dataset=train, data_collator=pack).train()

    model.eval()
    with torch.no_grad():  # without a cache, or transformers would not look for packed texts
        cycles = run_cycles(model, **pack(test), use_cache=False).outputs
    losses = ", ".join(f"{output.loss:.4f}" for output in cycles)
    print(f"Loss on paragraphs not trained on, cycle 1 (the deployed one) to {args.cycles}: {losses}")

    text = written_by(model)  # one pass per character, with a cache, in whichever mode the model is
    unwrap_multicycle(model).save_pretrained(args.out / "model")
    reloaded = written_by(LlamaForCausalLM.from_pretrained(args.out / "model"))
    print(f"The model writes: {text!r}")
    print(f"Stock transformers writes the same: {reloaded == text}")
    print("Wrote", *sorted(args.out.iterdir()), sep="\n  ")
    if reloaded != text:
        raise SystemExit("error: the checkpoint does not write the text of the trained model")


def paragraphs():
    """Paragraphs of at most 200 characters as rows of character codes."""
    texts = chain.from_iterable(topic.split("\n\n") for topic in topics.values())
    texts = [" ".join(text.split()) for text in texts]
    return [{"input_ids": [*text.encode(), END]} for text in texts if text.isascii() and 20 <= len(text) <= 200]


def written_by(model):
    prompt = torch.tensor([list(b"The ")])
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=60, do_sample=False)
    return bytes(code for code in written[0].tolist() if code != END).decode()


def parse_arguments():
    layout = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=layout)
    parser.add_argument("--steps", type=int, default=300, help="training steps, of 8 paragraphs each")
    parser.add_argument("--cycles", type=int, default=2, help="times the blocks run per training step")
    parser.add_argument("--out", type=Path, default="runs/train_lm", help="folder; if it has files, OUT-2, ...")
    args = parser.parse_args()
    for name, least in {"steps": 1, "cycles": 2}.items():
        if getattr(args, name) < least:
            parser.error(f"argument --{name}: needs at least {least}, got {getattr(args, name)}")
    folders = chain([args.out], (args.out.with_name(f"{args.out.name}-{number}") for number in count(2)))
    args.out = next(path for path in folders if not path.exists() or (path.is_dir() and not any(path.iterdir())))
    return args


if __name__ == "__main__":
    main()
