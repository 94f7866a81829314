"""The policy: a chat model with a LoRA adapter. Nothing here knows of skills, advantages or phases.

Sections: 1 loading, 2 prompts in and answers out, 3 log-probabilities and the step on a loss, 4 memory. The reference of the
KL term (G8) is the same model with its adapter switched off (`with policy.model.disable_adapter()`), never a second copy.

What differs from the usual script, and why:
- Nothing but temperature shapes the sampled distribution (no top-k, top-p or repetition penalty; a model's own
  generation_config is put aside), so that the policy whose log-probabilities are trained is the one that was sampled.
- A response ends with a stop token, or with the token that completes `</action>` or `</skill>`, trained like the others.
- Work is cut by a budget of padded tokens, not by a number of rows; the budgets are measured (`fit`).

Axes: B rows (a prompt and its response), T tokens of a row, N response tokens of several rows end to end, H width, V ids.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm

import gigpo

# Batches of any length leave no holes. Read by torch at the first look at the device, so here and not in `Policy`.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
HERE = Path(__file__).resolve().parent
END_TAGS = ("</action>", "</skill>")        # a response ends here
TAIL = 16                                   # tokens in which an end tag is looked for
PREFILL = 16384                             # padded prompt tokens read at once before generating: bounds their activations
PROBE_ROWS = 8                              # rows of the first probe of generation: as many longest prompts fill a PREFILL
SPARE = 0.85                                # share of the memory limit that budgets may fill; the rest is for holes
Item = TypeVar("Item")
Result = TypeVar("Result")


class UserError(Exception):
    """Something that the user can mend. The message is one line: what was wrong, and how to mend it."""


class Settings(Protocol):
    """What a policy reads of a configuration (`siri.Config` says what each means)."""
    model: str
    four_bit: bool
    lora_r: int
    lora_alpha: int
    max_prompt: int
    max_response: int
    temperature: float
    memory_gib: float
    gen_tokens: int
    update_tokens: int
    compact: bool                           # a tiny policy: it is faster on the CPU, whatever the machine has
    lr: float
    weight_decay: float
    seed: int


class Pair(Protocol):
    """A response under a prompt, token ids both; a row of training has more."""
    prompt: list[int]
    response: list[int]


# ---- 1. Loading --------------------------------------------------------------------------------------------

def load_base(cfg: Settings, device: str) -> tuple[Any, Any]:
    """The tokenizer and the frozen base model, in bf16 on a GPU (or NF4 with `four_bit`), in fp32 on a CPU. UserError for
    a model that can't be loaded or has no chat template."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerFast
    shipped = HERE / cfg.model                              # assets/tiny is found from any working directory
    source = str(shipped) if (shipped / "config.json").exists() else cfg.model
    local = Path(source).is_dir()
    if local and not (Path(source) / "config.json").exists():
        raise UserError(f"--model {cfg.model}: the folder has no config.json; it must be a model saved by save_pretrained")
    how: dict[str, Any] = dict(local_files_only=local, trust_remote_code=False)
    try:
        # AutoTokenizer would replace the pre-tokenizer of a custom fast tokenizer by Qwen2's own, silently.
        config = Path(source) / "tokenizer_config.json"
        custom = config.exists() and json.loads(config.read_text()).get("tokenizer_class") in (
            "TokenizersBackend", "PreTrainedTokenizerFast")
        tokenizer = (PreTrainedTokenizerFast if custom else AutoTokenizer).from_pretrained(source, **how)
        if not tokenizer.chat_template:
            raise UserError(f"--model {cfg.model}: its tokenizer has no chat template; use an instruct model")
        quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                   bnb_4bit_compute_dtype=torch.bfloat16) if cfg.four_bit else None
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.bfloat16 if device == "cuda" else torch.float32, quantization_config=quant,
            device_map={"": device} if device == "cuda" else None, use_safetensors=True, **how)
    except (OSError, ValueError, SafetensorError) as e:
        raise UserError(f"--model {cfg.model}: could not be loaded ({str(e).splitlines()[0]}); give a hub id that "
                        "this machine can reach, or a local folder") from e
    # peft's prepare_model_for_kbit_training would also turn the bf16 embeddings into fp32: 2.2 GiB more for a 7B model.
    if device == "cuda":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return tokenizer, model


def attach_adapter(model: Any, cfg: Settings, folder: Path | None) -> Any:
    """The base with a LoRA adapter on all linear layers: a new one, drawn from the seed, or the one saved in `folder`.
    UserError for an adapter that can't be loaded, or was made with other settings."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors import SafetensorError
    if folder is None:
        torch.manual_seed(cfg.seed)
        return get_peft_model(model, LoraConfig(r=cfg.lora_r, lora_alpha=cfg.lora_alpha, lora_dropout=0.0,
                                                target_modules="all-linear", task_type="CAUSAL_LM"))
    try:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / name).exists():
                raise OSError(f"{name} is missing")
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as e:
        raise UserError(f"{folder}: its adapter cannot be loaded ({' '.join(str(e).split())[:200]}); use another "
                        "checkpoint") from e
    saved = adapted.peft_config["default"]
    if (saved.r, saved.lora_alpha) != (cfg.lora_r, cfg.lora_alpha):
        raise UserError(f"--lora-r {cfg.lora_r} --lora-alpha {cfg.lora_alpha}: the adapter in {folder} has {saved.r} "
                        f"and {saved.lora_alpha}, which cannot be changed; leave these flags out")
    return adapted


class Policy:
    """A chat model with a LoRA adapter. UserError for a model or adapter that can't be loaded, has no chat template or
    does not fit into memory."""

    def __init__(self, cfg: Settings, adapter: Path | None = None):
        from transformers import GenerationConfig
        from transformers.utils.logging import disable_progress_bar
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)     # on kernels for 4 bits without CUDA
        disable_progress_bar()
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")      # peft's to mend
        self.cfg: Any = cfg                     # may hold more than Settings, for those who made it
        self.device = "cuda" if torch.cuda.is_available() and not cfg.compact else "cpu"
        self.tokenizer, base = load_base(cfg, self.device)
        self.model = attach_adapter(base, cfg, adapter)
        self.model.eval()
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.vocab = len(self.tokenizer)        # ids from here on are padding of the weight matrix, never sampled
        self.specials = sorted(set(self.tokenizer.all_special_tokens) | {
            t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}, key=len, reverse=True)
        # A response ends with one of the model's own end tokens, or with an end tag where that is a token.
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        known = self.tokenizer.get_added_vocab()
        self.stops: list[int] = sorted({e for e in ends if e is not None} | {known[t] for t in END_TAGS if t in known})
        # Tags of several tokens are found in the text instead, after any token that has a ">".
        spelled = not all(t in known for t in END_TAGS)
        self.closing = torch.tensor([i for t, i in self.tokenizer.get_vocab().items() if ">" in t and spelled],
                                    dtype=torch.long, device=self.device)
        self.pad: int = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.stops[0]
        self.model.generation_config = GenerationConfig(eos_token_id=self.stops, pad_token_id=self.pad)  # not the model's own
        self.gen_tokens, self.update_tokens = cfg.gen_tokens, cfg.update_tokens
        self.fit()

    # ---- 2. Prompts in, answers out ----------------------------------------------------------------------------

    def neutralise(self, text: str) -> str:
        """Break every control token in text that comes from a task, an environment or a skill, so that it stays text."""
        text = text.encode(errors="replace").decode()       # JSON can hold half a character, which no tokenizer takes
        # Until there is none: what is left of one token, put together, may be another.
        while any(t in text for t in self.specials):
            for t in self.specials:
                text = text.replace(t, t[0] + " " + t[1:])
        return text

    def encode(self, user: str) -> list[int]:
        """Token ids of a prompt: one user turn, and the header of the assistant's."""
        return self.tokenizer.apply_chat_template([{"role": "user", "content": self.neutralise(user)}],
                                                  add_generation_prompt=True, tokenize=True, return_dict=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, control tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def generate(self, prompts: Sequence[list[int]], temperature: float, max_new: int) -> list[list[int]]:
        """Sample one response per prompt (at most `max_new` ids, the stop token included), in batches of prompts of like
        length within `gen_tokens`. Temperature 0 is greedy. UserError if not even a single row fits into memory."""
        # Prompts of like length share a batch, so that little is padding; answers that are there survive a second try.
        out: list[list[int]] = [[] for _ in prompts]

        def work() -> None:
            missing = [i for i, ids in enumerate(out) if not ids]
            for batch in microbatches(missing, lambda i: len(prompts[i]) + max_new, self.gen_tokens):
                for i, ids in zip(batch, self.sample([prompts[i] for i in batch], temperature, max_new)):
                    out[i] = ids

        self.retry("gen_tokens", work)
        return out

    @torch.no_grad()
    def sample(self, prompts: Sequence[list[int]], temperature: float, max_new: int) -> list[list[int]]:
        """One batch of `generate`."""
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
        ids, mask = self.pad_batch(prompts)                                                        # (B, T) left-padded
        start, ended = ids.shape[1], dict[int, int]()

        def closes_a_tag(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            done = torch.isin(ids[:, -1], self.closing)                                            # (B,)
            for b in done.nonzero().flatten().tolist():
                text = self.tokenizer.decode(ids[b, max(start, ids.shape[1] - TAIL):])
                done[b] = any(tag in text for tag in END_TAGS)
                if done[b]:
                    ended.setdefault(b, ids.shape[1] - start)
            return done

        # No top-k, top-p or penalty: what is sampled from is what `logprobs` trains.
        config = GenerationConfig(
            do_sample=temperature > 0, temperature=temperature or 1.0, top_k=0, top_p=1.0, max_new_tokens=max_new,
            eos_token_id=self.stops, pad_token_id=self.pad, use_cache=True,
            prefill_chunk_size=max(32, PREFILL // len(prompts)))
        tokens = self.model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config,
            logits_processor=LogitsProcessorList([self.mask_padded_vocabulary]),
            stopping_criteria=StoppingCriteriaList([closes_a_tag] if len(self.closing) else []))
        # Rows that ended early were padded by `generate`: cut each after its stop token, or its end tag.
        rows = tokens[:, start:].tolist()
        return [row[:min(ended.get(b, len(row)), next((k + 1 for k, t in enumerate(row) if t in self.stops), len(row)))]
                for b, row in enumerate(rows)]

    def mask_padded_vocabulary(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """A logits processor: sets the scores (B, V) of ids that the tokenizer doesn't have to -inf, in place."""
        scores[:, self.vocab:] = -math.inf
        return scores

    def pad_batch(self, rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-pad to (B, T) ids and attention mask."""
        width = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (width - len(r)) + r for r in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=self.device)
        return ids, mask

    # ---- 3. Log-probabilities ------------------------------------------------------------------------------------

    def logprobs(self, rows: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability (for G7, G8, S9) and entropy, in nats at the training temperature, of every response token,
        the responses end to end: two fp32 tensors of shape (N,). Only the first has a gradient."""
        model = self.model.get_base_model()
        ids, mask = self.pad_batch([r.prompt + r.response for r in rows])                       # (B, T)
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False,
                                  position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).last_hidden_state    # (B, T, H)
        # A token is predicted by the state before it, so the logits of prompts, most of a batch, are never computed.
        states = torch.cat([hidden[b, -len(r.response) - 1:-1] for b, r in enumerate(rows)])      # (N, H)
        targets = torch.tensor([t for r in rows for t in r.response], device=self.device)         # (N,)
        return gigpo.token_logprobs(states, model.get_output_embeddings(), targets,
                                    temperature=self.cfg.temperature, vocab=self.vocab)

    def frozen_logprobs(self, rows: Sequence[Pair]) -> list[torch.Tensor]:
        """Each response's log-probabilities as they are now, (T,) each, without gradient, in batches within `update_tokens`."""
        def work() -> list[torch.Tensor]:
            out: dict[int, torch.Tensor] = {}
            for part in microbatches(range(len(rows)), lambda i: len(rows[i].prompt) + len(rows[i].response), self.update_tokens):
                logp, _ = self.logprobs([rows[i] for i in part])                                          # (N,)
                out.update(zip(part, logp.split([len(rows[i].response) for i in part])))
            return [out[i] for i in range(len(rows))]

        with torch.no_grad():
            return self.retry("update_tokens", work)

    def descend(self, optimizer: torch.optim.Optimizer, kinds: Iterable[Sequence[Any]],
                loss: Callable[[list[Any]], tuple[torch.Tensor, Counter]], grad_clip: float) -> Counter:
        """One optimizer step on a loss that is a sum over rows; none if the gradient is not finite. Rows have a length in
        tokens and come by kind; those of a kind share micro-batches. Returns the sums that `loss` gives beside its value,
        the gradient's norm before clipping, and whether the step was skipped."""
        def gradient() -> Counter:
            optimizer.zero_grad(set_to_none=True)           # of a try that ran out of memory
            sums: Counter = Counter()
            for rows in kinds:
                for part in microbatches(rows, len, self.update_tokens):
                    value, more = loss(part)
                    value.backward()
                    sums.update(more)
            return sums

        sums = self.retry("update_tokens", gradient)
        sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.trainable, grad_clip).item()
        # A loss that is not finite makes the gradient so, and one such step would end the policy.
        sums["skipped"] = int(not math.isfinite(sums["grad_norm"]))
        if not sums["skipped"]:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sums

    # ---- 4. Memory -----------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Token budgets that were left open: from two probes of each kind of work, which give its bytes per token. UserError
        if the smaller one, 8 rows to generate or one to update, does not fit into `memory_gib`."""
        cfg = self.cfg
        if self.device == "cpu":
            self.gen_tokens, self.update_tokens = self.gen_tokens or 32768, self.update_tokens or 8192
            return
        # Two probes of each kind of work are a line: what is taken anyway, and what a token takes more.
        total = torch.cuda.get_device_properties(0).total_memory
        limit = min(cfg.memory_gib * 2**30, torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
        torch.cuda.set_per_process_memory_fraction(limit / total)
        adam = sum(p.numel() for p in self.trainable) * (2 if cfg.four_bit else 8)      # bytes of optimizer state
        longest: Any = SimpleNamespace(prompt=[0] * cfg.max_prompt, response=[0] * cfg.max_response)

        def update(rows: int) -> None:
            self.model.train()
            self.logprobs([longest] * rows)[0].sum().backward()
            self.rest()

        if not self.gen_tokens:
            self.gen_tokens = self.budget(lambda rows: self.sample([longest.prompt] * rows, 1.0, 2), PROBE_ROWS, cfg.max_prompt + 2,
                                          SPARE * limit - adam)
        if not self.update_tokens:
            self.update_tokens = self.budget(update, 1, cfg.max_prompt + cfg.max_response, SPARE * limit - adam)
        torch.cuda.empty_cache()

    def rest(self) -> None:
        """Drop gradients and leave training mode."""
        self.model.zero_grad(set_to_none=True)
        self.model.eval()

    def budget(self, probe: Callable[[int], Any], rows: int, width: int, usable: float) -> int:
        """Tokens that fit into `usable` bytes, by the peaks of probing `rows` and twice as many rows of `width` tokens.
        UserError if the first probe doesn't fit; if only the second doesn't, the budget is the first one's tokens."""
        cfg = self.cfg

        def peak(n: int) -> float:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            probe(n)
            return torch.cuda.max_memory_allocated()

        try:
            once = peak(rows)
        except torch.OutOfMemoryError as e:
            raise UserError(f"--memory-gib {cfg.memory_gib}: {rows} rows of {cfg.max_prompt + cfg.max_response} tokens do not "
                            f"fit; lower --max-prompt and --max-response{'' if cfg.four_bit else ', or add --4bit'}") from e
        try:
            twice = peak(2 * rows)
        except torch.OutOfMemoryError:
            twice = math.inf
            self.rest()
        return int(rows * width * (1 + max(0, usable - once) / (twice - once)))

    def retry(self, budget: str, work: Callable[[], Result]) -> Result:
        """Do the work; each time the device runs out of memory, halve the token budget (`gen_tokens` or `update_tokens`)
        and do it again. UserError once the budget is down to a single row."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                pass                            # not here: the traceback still holds the tensors
            tokens = getattr(self, budget)
            if tokens <= self.cfg.max_prompt + self.cfg.max_response:
                raise UserError("out of memory with a single row: lower --max-prompt and --max-response"
                                f"{'' if self.cfg.four_bit else ', or add --4bit'}")
            setattr(self, budget, tokens // 2)
            tqdm.write(f"     out of memory: {budget} is {tokens // 2} from here on; trying again")


# ---- 5. Helpers ------------------------------------------------------------------------------------------------

def make_optimizer(policy: Policy) -> torch.optim.Optimizer:
    """AdamW [R] over the adapter; with 4-bit weights its moments are kept in 8 bits [O]."""
    if policy.cfg.four_bit:
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        from torch.optim import AdamW
    return AdamW(policy.trainable, lr=policy.cfg.lr, betas=(0.9, 0.999), weight_decay=policy.cfg.weight_decay)


def microbatches(items: Iterable[Item], length: Callable[[Item], int], budget: int) -> Iterable[list[Item]]:
    """The items sorted by length (tokens) and cut where the padded size would exceed the token budget; one above it is alone."""
    batch: list[Item] = []
    for item in sorted(items, key=length):
        if batch and (len(batch) + 1) * length(item) > budget:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def device_gib() -> float:
    """Memory of the CUDA device, in GiB; 0 without one."""
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0


def peak_gib() -> float:
    """Peak memory so far, in GiB: of the device where one is used, else the process's resident memory."""
    if torch.cuda.is_initialized() and (taken := torch.cuda.max_memory_allocated()):
        return taken / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
