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

import contextlib
import ctypes
import datetime
import hashlib
import json
import logging
import math
import os
import re
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any, Protocol, TypeVar

import psutil
import torch

import gigpo
from decode import PREFILL, Answer, Ask, Decoder, Follow, Unservable, draw, in_lock_step, uniforms
from tools.limits import within
from tools.ranks import SLOW, Ranks
from tools.terminal import say

# Batches of any length leave no holes. Read by torch at the first look at the device, so here and not in `Policy`.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
HERE = Path(__file__).resolve().parent
TEMPLATE_S = 10                             # seconds at most for a turn through a chat template; it takes none
TAGS = ("<think>", "</think>", "<action>", "</action>", "<skill>", "</skill>")      # that prompts and responses are written with
END_TAGS = ("</action>", "</skill>")        # a response ends here
PROBE = "-siri-probe-"                      # a turn of no meaning, to see what a chat template writes around it
ROLE = r"<[^\s<>]+>|\[/?[A-Z_]+\]|#{2,} *\w+:?|^\w+:"       # how templates mark roles in plain text
TAIL = 16                                   # tokens in which an end tag is looked for
CHECKED = 8                                 # tokens of each answer that is compared when a model is loaded
PROBE_ROWS = 8                              # rows of the first probe of generation: as many longest prompts fill a PREFILL
CPU_TOKENS = 32768                          # padded tokens of a batch on a CPU, at most
DECODING = 2 * 2**30                        # bytes that decoding takes beside the cache: activations of PREFILL, logits, graphs
NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16")
SPARE = 0.85                                # share of the memory limit that budgets may fill; the rest is for holes
Item = TypeVar("Item")
Result = TypeVar("Result")
Tick = Callable[[str, int, int], None]       # what is being done; how much of it; of how much


class UserError(Exception):
    """Something that the user can mend. The message is one line: what was wrong, and how to mend it."""


class Settings(Protocol):
    """What a policy reads of a configuration (`siri.Config` says what each means)."""
    model: str
    base: str
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
    date: str
    thinking: bool
    lr: float
    weight_decay: float
    seed: int


class Pair(Protocol):
    """A response under a prompt, token ids both; a row of training has more."""
    prompt: list[int]
    response: list[int]


# ---- 1. Loading --------------------------------------------------------------------------------------------

def source_of(model: str) -> tuple[str, dict[str, Any]]:
    """Where a model's files are, and how they are read. UserError for a folder without a model."""
    shipped = HERE / model                                  # assets/tiny is found from any working directory
    source = str(shipped) if (shipped / "config.json").exists() else model
    local = Path(source).is_dir()
    if local and not (Path(source) / "config.json").exists():
        raise UserError(f"--model {model}: the folder has no config.json; it must be a model saved by save_pretrained")
    return source, dict(local_files_only=local, trust_remote_code=False)


def keep_quiet() -> None:
    """Keep from the terminal what other packages say of themselves."""
    from transformers.utils.logging import disable_progress_bar
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)     # on kernels for 4 bits without CUDA
    disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")      # peft's to mend


def load_tokenizer(source: str, how: dict[str, Any]) -> Any:
    """The tokenizer of a model, as its files describe it."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    # AutoTokenizer would replace the pre-tokenizer of a custom fast tokenizer by Qwen2's own, silently.
    config = Path(source) / "tokenizer_config.json"
    custom = config.exists() and json.loads(config.read_text()).get("tokenizer_class") in (
        "TokenizersBackend", "PreTrainedTokenizerFast")
    return (PreTrainedTokenizerFast if custom else AutoTokenizer).from_pretrained(source, **how)


def load_base(cfg: Settings, device: str, sharing: int) -> tuple[Any, Any, str]:
    """The tokenizer, the frozen base model and its fingerprint; in bf16 on a GPU (or NF4 with `four_bit`), in fp32 on a
    CPU. UserError for a model that can't be loaded as it was saved: to the last weight, and not quantised by others."""
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    source, how = source_of(cfg.model)
    try:
        tokenizer, config = load_tokenizer(source, how), AutoConfig.from_pretrained(source, **how)
        refuse_too_large(cfg, source, config, device, sharing)
        base = same_base(cfg, source, config)
        quantised = getattr(config, "quantization_config", None)
        if quantised and device == "cpu":
            raise UserError(f"--model {cfg.model}: its weights are quantised already, which needs a CUDA device; give the model "
                            "that it was made from")
        # Log-probabilities of one row are taken several times (G7, G8): dropout in the base would make each another policy's.
        for part in (config, config.get_text_config()):
            for name in [n for n, value in vars(part).items() if re.search("drop(out)?$|pdrop|layerdrop", n) and value]:
                setattr(part, name, 0.0)
        quant = BitsAndBytesConfig(**NF4) if cfg.four_bit and not quantised else None
        model, report = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=torch.bfloat16 if device == "cuda" else torch.float32, use_safetensors=True,
            device_map={"": torch.cuda.current_device()} if device == "cuda" else None, output_loading_info=True,
            ignore_mismatched_sizes=True, **(dict(quantization_config=quant) if quant else {}), **how)
    except UserError:
        raise
    except Exception as e:                      # what a model folder can be wrong in, others' code raises as anything
        raise UserError(f"--model {cfg.model}: could not be loaded ({one_line(e)}); give a hub id that this machine can "
                        "reach, or a local folder") from e
    for what in ("missing", "mismatched", "unexpected"):
        if keys := sorted(map(str, report[f"{what}_keys"])):
            raise UserError(f"--model {cfg.model}: {len(keys)} weights are {what}, such as {keys[0][:80]}: it would not be the "
                            "model that was saved; get it again, or give the model that it was made from")
    merge_adapters(model)
    # peft's prepare_model_for_kbit_training would also turn the bf16 embeddings into fp32: 2.2 GiB more for a 7B model.
    if not cfg.compact:                         # a tiny policy is faster without
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable     # its older name
        enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return tokenizer, model, base


def fingerprint(source: str, config: Any) -> str:
    """What a base model is known by: its revision on the hub, or a hash of its folder's JSON files and, of its weights, of the
    sizes and of 64 KiB at the beginning, in the middle and at the end."""
    if not Path(source).is_dir():
        return str(getattr(config, "_commit_hash", None) or "")
    seen = hashlib.sha256()
    kinds = (".json", ".safetensors", ".jinja", ".model")
    for path in sorted(path for path in Path(source).iterdir() if path.suffix in kinds and path.is_file()):
        size = path.stat().st_size
        seen.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as f:
            for at in (0, size // 2, max(0, size - 2**16)) if path.suffix == ".safetensors" else (0,):
                f.seek(at)
                seen.update(f.read(2**16 if path.suffix == ".safetensors" else -1))
    return seen.hexdigest()[:16]


def same_base(cfg: Settings, source: str, config: Any) -> str:
    """The fingerprint of a base model. UserError if the adapter was trained on another one."""
    base = fingerprint(source, config)
    if cfg.base not in ("", base):
        raise UserError(f"--model {cfg.model}: is another base model ({base}) than the one that the adapter was trained on "
                        f"({cfg.base}); give that one")
    return base


def refuse_too_large(cfg: Settings, source: str, config: Any, device: str, ranks: int) -> None:
    """UserError for a local model whose weights, in fp32 and once for each of so many ranks, are more than a CPU's free memory: the
    kernel would end the program."""
    size = ranks * sum(path.stat().st_size for path in Path(source).glob("*.safetensors"))
    size *= 2 if getattr(config, "dtype", None) in (torch.bfloat16, torch.float16) else 1
    if device == "cpu" and size > (free := free_memory()):
        raise UserError(f"--model {cfg.model}: its weights take {size / 2**30:.1f} GiB in fp32, and {free / 2**30:.1f} GiB are "
                        "free; use a smaller model, or a GPU")


def merge_adapters(model: Any) -> None:
    """Make an adapter that lay in the model's folder, and was loaded with it, part of the base: it is the reference, too."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if getattr(model, "_hf_peft_config_loaded", False):
        model._hf_peft_config_loaded = False
        del model.peft_config


def attach_adapter(model: Any, cfg: Settings, folder: Path | None) -> Any:
    """The base with a LoRA adapter on all linear layers, drawn from the seed, or with the tensors saved in `folder`. UserError
    for layers that can't carry one, tensors that don't fit, and an adapter that was made with other settings."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    torch.manual_seed(cfg.seed)
    try:
        adapted = get_peft_model(model, LoraConfig(r=cfg.lora_r, lora_alpha=cfg.lora_alpha, lora_dropout=0.0,
                                                   target_modules="all-linear", task_type="CAUSAL_LM"))
    except Exception as e:                      # peft's errors are of any type
        raise UserError(f"--model {cfg.model}: cannot carry a LoRA adapter on all of its linear layers ({one_line(e)}); use "
                        "another model") from e
    for module in adapted.modules():
        if isinstance(module, LoraLayer) and type(module).__name__ in ("Linear", "Linear4bit"):       # experts are of another kind
            module.forward = MethodType(lora_forward, module)
    if folder is None:
        return adapted
    # Of a saved adapter only the numbers are taken: what it is made of is known, and a file from elsewhere has no say in it.
    try:
        tensors, saved = load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_bytes())
        r, alpha = saved["r"], saved["lora_alpha"]
        if (r, alpha) != (cfg.lora_r, cfg.lora_alpha):
            raise UserError(f"--lora-r {cfg.lora_r} --lora-alpha {cfg.lora_alpha}: the adapter in {folder} has {r} and {alpha}, "
                            "which cannot be changed; leave these flags out")
        own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in tensors.items()}:
            raise ValueError("its tensors are not those of this model's linear layers")
        set_peft_model_state_dict(adapted, tensors)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as e:
        raise UserError(f"{folder}: its adapter cannot be loaded ({one_line(e)}); use another checkpoint") from e
    return adapted


def lora_forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """An adapted layer, y = W x + s B A x, with products in the precision of the base (sums of products are fp32 anyway). The
    adapter's own weights stay fp32, for the optimizer. peft would cast x up and the product down in each layer, which on a GPU
    takes longer than the products."""
    y = layer.base_layer(x, *args, **kwargs)
    if layer.disable_adapters:
        return y
    weights, scale, flat = [layer.lora_A["default"].weight, layer.lora_B["default"].weight], layer.scaling["default"], y.shape[-1]
    if torch.is_grad_enabled() or weights[0].dtype == x.dtype:
        a, b = (w.to(x.dtype) for w in weights)
    else:           # copies in the base's precision, made once for each update, at places that a CUDA graph may remember
        versions = [w._version for w in weights]
        if getattr(layer, "copied", None) != versions:
            layer.copies = getattr(layer, "copies", None) or [torch.empty_like(w, dtype=x.dtype) for w in weights]
            for copy, w in zip(layer.copies, weights):
                copy.copy_(w)
            layer.copied = versions
        a, b = layer.copies
    hidden = torch.nn.functional.linear(x, a).view(-1, a.shape[0])                                  # (B T, r)
    if torch.is_grad_enabled():
        return torch.addmm(y.view(-1, flat), hidden, b.t(), alpha=scale).view_as(y)
    y.view(-1, flat).addmm_(hidden, b.t(), alpha=scale)
    return y


def one_line(error: Exception) -> str:
    """What an exception of another program says, short."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class Chat:
    """A tokenizer and its chat template: a turn to ids, and ids to text. UserError for a template or tokenizer that can't serve."""

    def __init__(self, tokenizer: Any, cfg: Settings, ends: set[int]) -> None:
        self.tokenizer, self.before = tokenizer, list[dict[str, str]]()
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise UserError(f"--model {cfg.model}: its tokenizer has no chat template; use an instruct model")
        if not tokenizer.is_fast:
            raise UserError(f"--model {cfg.model}: its tokenizer has no tokenizer.json, without which it can't be told "
                            "where in a text a token is from; save it again as a fast one")
        # A template that writes the date writes the same one tomorrow.
        today = datetime.date.fromisoformat(cfg.date) if cfg.date else datetime.date.today()
        template = "{%- set enable_thinking = false -%}" * (not cfg.thinking) + template
        tokenizer.chat_template = re.sub(r"strftime_now\s*\(\s*(['\"])(.*?)\1\s*\)", lambda m: repr(today.strftime(m[2])), template)
        if refusal := self.refusal():                           # some templates want a system turn, and most can do without
            self.before = [dict(role="system", content="You are a helpful assistant.")]
            if self.refusal():
                raise UserError(f"--model {cfg.model}: its chat template takes no user turn ({refusal}); use another model")
        added = tokenizer.added_tokens_decoder.items()
        ours = {i for i, t in added if t.content in TAGS}
        self.hidden = ({i for i, t in added if t.special} | set(tokenizer.all_special_ids)) - ours           # left out of texts
        marks = {i for i, t in added if re.fullmatch(r"[<\[{|].*[>\]}|]", t.content.strip())}
        unknown = {tokenizer.unk_token_id}.intersection(tokenizer("\u2603\u0f0c", add_special_tokens=False).input_ids)
        self.control = (self.hidden | marks) - ours - unknown           # what no text of others may turn into
        before, _, after = self.render(PROBE).partition(PROBE)
        self.structure = self.controls(self.ids("x"))
        marks_of_roles = set(re.findall(ROLE, before + "\n" + after, re.MULTILINE)) - {*TAGS}
        self.roles = sorted((mark for mark in marks_of_roles if len(mark) > 2), key=len, reverse=True)
        # A template may begin the answer itself: with a thought that is open, or with an empty one.
        self.opening = after[after.rindex("<think>"):] if "<think>" in after else ""
        # A response ends with one of the model's own end tokens, or with an end tag where that is a token.
        ends = {e for e in ends | {tokenizer.eos_token_id} if isinstance(e, int)}
        self.vocab = max([len(tokenizer) - 1, *tokenizer.get_vocab().values(), *ends]) + 1
        known = tokenizer.get_added_vocab()
        self.stops = sorted(ends | {known[t] for t in END_TAGS if t in known})
        if not ends:
            raise UserError(f"--model {cfg.model}: neither its tokenizer nor its generation_config names an end token; use an "
                            "instruct model")
        for tag in TAGS:
            if tag not in self.text(tokenizer(tag, add_special_tokens=False).input_ids):
                raise UserError(f"--model {cfg.model}: its tokenizer does not give {tag} back; use another instruct model")

    def refusal(self) -> str:
        """Why the template takes no turn; empty if it does."""
        try:
            with within(TEMPLATE_S, "a turn in its chat template"):
                self.render("x")
        except Exception as e:                                  # templates are programs, and may raise anything
            return one_line(e)
        return ""

    def render(self, user: str) -> str:
        """The prompt as text."""
        return self.tokenizer.apply_chat_template([*self.before, dict(role="user", content=user)], add_generation_prompt=True,
                                                  tokenize=False)

    def ids(self, user: str) -> list[int]:
        """The prompt's ids, whatever they say."""
        return self.tokenizer(self.render(user), add_special_tokens=False).input_ids

    def controls(self, ids: Iterable[int]) -> list[int]:
        """The control tokens among ids, in their order."""
        return [i for i in ids if i in self.control]

    def encode(self, user: str) -> list[int]:
        """Token ids of a prompt: one user turn, and the header of the assistant's. Its control tokens are the template's and no
        others: what would become one, as it stands or once it is normalised, and marks of roles are broken by a space. UserError
        for text that can't be told from the template's."""
        user = user.encode(errors="replace").decode()       # JSON can hold half a character, which no tokenizer takes
        for role in self.roles:
            user = user.replace(role, role[0] + " " + role[1:])
        for attempt in range(20):
            if self.controls(ids := self.ids(user)) == self.structure:
                return ids
            user = self.broken(user, attempt)
        raise UserError("a text holds control tokens of the chat template that cannot be broken: " + repr(user[:60]))

    def broken(self, user: str, attempt: int) -> str:
        """The text with its control tokens broken by a space; what is a single character, or was broken in vain, is replaced."""
        whole = self.render(user)
        start = whole.find(user.strip()) - (len(user) - len(user.lstrip())) * (user not in whole)      # templates may trim a turn
        start = whole.find(user) if user in whole else start
        found = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        for i, (a, b) in reversed([*zip(found.input_ids, found.offset_mapping)]):
            a, b = a - start, b - start
            if i in self.control and 0 <= a < b <= len(user):
                a += len(user[a:b]) - len(user[a:b].lstrip())
                user = user[:a + 1] + " " + user[a + 1:] if attempt < 2 and b - a > 1 else user[:a] + " " + user[b:]
        return user

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids, control tokens left out."""
        return self.tokenizer.decode([i for i in ids if i not in self.hidden])


class Policy:
    """A chat model with a LoRA adapter. UserError for a model or adapter that can't be loaded, has no chat template or
    does not fit into memory."""

    def __init__(self, cfg: Settings, adapter: Path | None = None, ranks: Ranks | None = None):
        from transformers import GenerationConfig
        keep_quiet()
        self.cfg: Any = cfg                     # may hold more than Settings, for those who made it
        self.ranks = ranks or Ranks()
        self.device = "cuda" if torch.cuda.is_available() and not cfg.compact else "cpu"
        self.tokenizer, base, self.base = load_base(cfg, self.device, self.ranks.sharing)
        ends = base.generation_config.eos_token_id
        self.chat = Chat(self.tokenizer, cfg, set(ends if isinstance(ends, list) else [ends]))
        self.vocab = self.chat.vocab            # ids from here on are padding of the weight matrix, never sampled
        self.stops = self.chat.stops
        if self.vocab > (width := base.get_output_embeddings().weight.shape[0]):
            raise UserError(f"--model {cfg.model}: its tokenizer has {self.vocab} ids and its weights {width}; get it again")
        self.model = attach_adapter(base, cfg, adapter)
        self.model.eval()
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        # Tags of several tokens are found in the text instead, after any token that has a ">".
        known = self.tokenizer.get_added_vocab()
        spelled = not all(t in known for t in END_TAGS)
        self.closing = {i for t, i in self.tokenizer.get_vocab().items() if ">" in t and spelled}
        self.pad: int = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.stops[0]
        self.model.generation_config = GenerationConfig(eos_token_id=self.stops, pad_token_id=self.pad)  # not the model's own
        self.gen_tokens, self.update_tokens = cfg.gen_tokens, cfg.update_tokens
        self.work: Counter[str] = Counter()     # of decoding: steps, and in them rows live and computed
        self.pays: dict[tuple[int, int, int], bool] = {}        # of a product in 4 bits (rows, in, out): faster with bf16 weights?
        self.tick: Tick = lambda name, done, of: None           # is told how far a piece of work is, for whoever watches
        self.lock_step = ""                     # why answers come from `generate`, batch by batch, and not from the decoder
        self.check()
        self.fit()
        if self.device == "cpu" and not cfg.compact:
            self.ranks.patience = SLOW
        self.gen_tokens, self.update_tokens = map(min, zip(*self.ranks.gather((self.gen_tokens, self.update_tokens))))

    @torch.no_grad()
    def check(self) -> None:
        """UserError unless the log-probabilities that are trained are those that sampling uses, on prompts of unequal length and
        with an adapter that does something: a model may scale or mask in ways that `logprobs` does not know. And where the
        decoder's answers are not those of `generate`, it isn't used."""
        prompts, dice = [self.encode("look " * n) for n in (1, 30, 7, 19, 2, 11, 24, 4)], torch.Generator().manual_seed(0)
        adapter = [(p, p.clone()) for name, p in self.model.named_parameters() if "lora_B" in name]
        # In bf16 the kernels of one token and of many round apart; what is not known moves whole nats.
        noise = 1e-3 if self.model.dtype == torch.float32 else 0.3
        try:
            for p, _ in adapter:
                p.copy_(torch.randn(p.shape, generator=dice) * 0.005)
            tokens, logits = self.reference_answers(prompts, CHECKED)                               # (B, n), (B, n, V)
            sampled = (logits / self.cfg.temperature).log_softmax(-1).gather(-1, tokens[..., None]).flatten()
            self.model.train()                                                  # as in an update
            trained, _ = self.logprobs([SimpleNamespace(prompt=q, response=r) for q, r in zip(prompts, tokens.tolist())])
            self.model.eval()
            off = (trained - sampled).abs().mean().item()
            if off < noise and (why := self.decoder_differs(prompts, tokens, logits, noise)):
                self.lock_step = why
                say(f"answers come from `generate`, batch by batch, which is slower than the decoder: {why}")
        except Exception as e:          # a model's own code may raise anything
            if isinstance(e, UserError) or out_of_memory(e):
                raise
            raise UserError(f"--model {self.cfg.model}: cannot generate or be trained ({one_line(e)}); use another model") from e
        finally:
            self.model.eval()
            for p, saved in adapter:
                p.copy_(saved)
        if not off < noise:
            raise UserError(f"--model {self.cfg.model}: the log-probabilities that would be trained are {off:.2g} nats a token off "
                            "those that it samples with: its architecture needs what is not here; use another model")

    def reference_answers(self, prompts: Sequence[list[int]], n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The n likeliest next tokens of each prompt, in turn, as `generate` finds them: ids (B, n), and logits (B, n, V)."""
        from transformers import GenerationConfig, LogitsProcessorList
        ids, mask = self.pad_left(prompts)
        said = self.model.generate(
            input_ids=ids, attention_mask=mask, logits_processor=LogitsProcessorList([self.mask_padded_vocabulary]),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=n, min_new_tokens=n, pad_token_id=self.pad, eos_token_id=self.stops,
                prefill_chunk_size=32, output_logits=True, return_dict_in_generate=True))
        return said.sequences[:, ids.shape[1]:], torch.stack(said.logits, 1)[..., :self.vocab].float()

    def decoder_differs(self, prompts: Sequence[list[int]], tokens: torch.Tensor, logits: torch.Tensor, noise: float) -> str:
        """Why the decoder can't be used; empty if it answers as `generate` did, up to choices that were even within `noise`."""
        said: dict[int, list[int]] = {}
        try:
            self.decoder(len(prompts), max(map(len, prompts)) + tokens.shape[1]).answer(
                enumerate((ids, 0) for ids in prompts), said.__setitem__, lambda ids: False, 0.0, tokens.shape[1])
        except Exception as e:          # an architecture may want anything
            if out_of_memory(e):
                raise
            return str(e) if isinstance(e, Unservable) else one_line(e)
        for i, row in enumerate(tokens.tolist()):
            for k, (ours, theirs) in enumerate(zip(said[i], row)):
                if ours != theirs:
                    gap = (logits[i, k, theirs] - logits[i, k, ours]).item()
                    if not gap < noise:
                        return f"it would give other tokens (a choice that is {gap:.2g} nats worse)"
                    break               # what follows a tie may be anything
        return ""

    # ---- 2. Prompts in, answers out ----------------------------------------------------------------------------

    def encode(self, user: str) -> list[int]:
        """Token ids of a prompt: one user turn, and the header of the assistant's. UserError as `Chat.encode`."""
        self.ranks.alive()
        return self.chat.encode(user)

    def answer(self, ids: Sequence[int]) -> str:
        """A response as text, with the part of it that the template has begun."""
        return self.chat.opening + self.decode(ids)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in peft's format. OSError or SafetensorError if it can't be written."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file
        config = self.model.peft_config["default"].to_dict() | dict(inference_mode=True)
        # peft's own save would ask the model hub, and write sets in an order that changes from one process to the next.
        config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str))
        save_file(get_peft_model_state_dict(self.model, save_embedding_layers=False), folder / "adapter_model.safetensors",
                  metadata={"format": "pt"})

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, control tokens left out."""
        return self.chat.text(ids)

    def generate(self, prompts: Sequence[list[int]], temperature: float, max_new: int,
                 dice: Sequence[int] | None = None) -> list[list[int]]:
        """Sample one response per prompt (at most `max_new` ids, the stop token included), drawn with the prompts' streams of
        random numbers, by default their places. Temperature 0 is greedy. Every rank gets all of them, and samples its share.
        UserError as `converse`."""
        out: list[list[int]] = [[] for _ in prompts]
        own = self.ranks.share(range(len(prompts)), lambda i: len(prompts[i]))
        if own:
            asks = ((i, (prompts[i], dice[i] if dice else i)) for i in own)
            self.converse(asks, out.__setitem__, temperature, max_new, len(own), max(map(len, prompts)))
        for said in self.ranks.others(lambda: [(i, out[i]) for i in own]):
            for i, ids in said:
                out[i] = ids
        return out

    def converse(self, asks: Iterable[tuple[int, Ask]], follow: Follow, temperature: float, max_new: int, at_once: int,
                 longest: int = 0) -> None:
        """Sample a response to each of the numbered prompts; `follow(i, ids)` takes that of number i, and returns what i is asked
        next, or None. At most `at_once` are answered together, others are read from `asks` when there is room; no prompt is
        longer than `longest`, by default `max_prompt`. How rows share batches (`gen_tokens`) is not seen in any response.
        UserError if not even a single row fits into memory."""
        if "generate" in vars(self):                    # another engine, or a script, was put in its place: it is asked in rounds
            return in_lock_step(asks, follow, lambda asks: self.generate(
                [prompt for prompt, _ in asks], temperature, max_new, [dice for _, dice in asks]), at_once)
        fresh, unheard = iter(asks), dict[int, Ask]()

        def waiting() -> Iterable[tuple[int, Ask]]:
            yield from [*unheard.items()]               # of a try that ran out of memory; what was heard before is kept
            for i, one in fresh:
                unheard[i] = one
                yield i, one

        def heard(i: int, ids: list[int]) -> Ask | None:
            del unheard[i]
            if (more := follow(i, ids)) is not None:
                unheard[i] = more
            return more

        with self.ranks.working():
            self.retry("gen_tokens", lambda: self.answer_all(
                waiting(), heard, temperature, max_new, at_once, longest or self.cfg.max_prompt))

    def answer_all(self, asks: Iterable[tuple[int, Ask]], follow: Follow, temperature: float, max_new: int, at_once: int,
                   longest: int) -> None:
        """`converse` by the decoder, or in lock step by `generate`, where prompts of like length share a batch."""
        def speak(asks: list[Ask]) -> list[list[int]]:
            said: dict[int, list[int]] = {}
            for batch in microbatches(range(len(asks)), lambda i: len(asks[i][0]) + max_new, self.gen_tokens or 10**9):
                said.update(zip(batch, self.sample([asks[i] for i in batch], temperature, max_new)))
            return [said[i] for i in range(len(asks))]

        if self.lock_step:
            return in_lock_step(asks, follow, speak, at_once)
        rows = min(at_once, max(1, self.gen_tokens // (longest + max_new)) if self.gen_tokens else at_once)
        with self.unpacked(rows, longest + max_new):
            self.decoder(rows, longest + max_new).answer(asks, follow, self.ended, temperature, max_new)

    def decoder(self, rows: int, length: int) -> Decoder:
        """A decoder of so many rows of so many tokens, which counts its work in ours."""
        model = self.model.get_base_model()
        return Decoder(model, output_head(model), rows, length, self.vocab, self.work)

    def ended(self, ids: list[int]) -> bool:
        """Whether a response ends with its last token: a stop token, or the one that completes an end tag."""
        self.ranks.alive()
        return ids[-1] in self.stops or ids[-1] in self.closing and any(
            tag in self.tokenizer.decode(ids[-TAIL:]) for tag in END_TAGS)

    @torch.no_grad()
    def sample(self, asks: Sequence[Ask], temperature: float, max_new: int) -> list[list[int]]:
        """One batch of answers by `generate`: the reference for the decoder, and what serves where that can't."""
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
        ids, mask = self.pad_left([prompt for prompt, _ in asks])                                  # (B, T)
        start, logps = ids.shape[1], list[torch.Tensor]()
        numbers = uniforms([dice for _, dice in asks], max_new).to(self.device)                    # (B, max_new)

        def drawn(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            chosen, logp = draw(scores, numbers[:, ids.shape[1] - start], temperature, self.vocab)       # (B,) each
            logps.append(logp)
            return torch.full_like(scores, -math.inf).scatter_(1, chosen[:, None], 0.0)

        def all_ended(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.tensor([self.ended(row) for row in ids[:, start:].tolist()], device=self.device)

        # No top-k, top-p or penalty: what is sampled from is what `logprobs` trains. The draw leaves one choice.
        config = GenerationConfig(do_sample=False, max_new_tokens=max_new, eos_token_id=self.stops, pad_token_id=self.pad,
                                  use_cache=True, prefill_chunk_size=max(32, PREFILL // len(asks)))
        tokens = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config,
                                     logits_processor=LogitsProcessorList([drawn]),
                                     stopping_criteria=StoppingCriteriaList([all_ended]))
        # Rows that ended early were padded by `generate`: each is cut where it ended.
        said = [next((row[:k] for k in range(1, len(row)) if self.ended(row[:k])), row) for row in tokens[:, start:].tolist()]
        return [Answer(row, logp[:len(row)]) for row, logp in zip(said, torch.stack(logps, 1).tolist())]

    def mask_padded_vocabulary(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """A logits processor: sets the scores (B, V) of ids that the tokenizer doesn't have to -inf, in place."""
        scores[:, self.vocab:] = -math.inf
        return scores

    def pad_left(self, rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
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
        # Padding on the right is seen by no token before it: without a mask, attention takes its fast kernels.
        width = max(len(r.prompt) + len(r.response) for r in rows)
        ids = torch.tensor([[*r.prompt, *r.response] + r.prompt[:1] * (width - len(r.prompt) - len(r.response)) for r in rows],
                           device=self.device)                                                    # (B, T)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state               # (B, T, H)
        # A token is predicted by the state before it, so the logits of prompts, most of a batch, are never computed.
        states = torch.cat([hidden[b, len(r.prompt) - 1:len(r.prompt) + len(r.response) - 1] for b, r in enumerate(rows)])  # (N, H)
        targets = torch.tensor([t for r in rows for t in r.response], device=self.device)         # (N,)
        return gigpo.token_logprobs(states, output_head(model), targets,
                                    temperature=self.cfg.temperature, vocab=self.vocab)

    def frozen_logprobs(self, rows: Sequence[Pair]) -> list[torch.Tensor]:
        """Each response's log-probabilities as they are now, (T,) each, without gradient, in batches within `update_tokens`."""
        def work() -> list[torch.Tensor]:
            out: dict[int, torch.Tensor] = {}
            for part in microbatches(range(len(rows)), lambda i: len(rows[i].prompt) + len(rows[i].response), self.update_tokens):
                self.ranks.alive()
                logp, _ = self.logprobs([rows[i] for i in part])                                          # (N,)
                out.update(zip(part, logp.split([len(rows[i].response) for i in part])))
            return [out[i] for i in range(len(rows))]

        with torch.no_grad(), self.ranks.working():
            return self.retry("update_tokens", work)

    def descend(self, optimizer: torch.optim.Optimizer, kinds: Iterable[Sequence[Any]],
                loss: Callable[[list[Any]], tuple[torch.Tensor, Counter]], grad_clip: float) -> Counter:
        """One optimizer step on a loss that is a sum over rows; none if the gradient is not finite. Rows have a length in
        tokens and come by kind; those of a kind share micro-batches. Each rank has rows of its own, or none; gradient and sums are
        over all of them, so that the step is the same on every rank. Returns the sums that `loss` gives beside its value, the
        gradient's norm before clipping, and whether the step was skipped."""
        def gradient() -> Counter:
            optimizer.zero_grad(set_to_none=True)           # of a try that ran out of memory
            sums: Counter = Counter()
            for rows in kinds:
                for part in microbatches(rows, len, self.update_tokens):
                    self.ranks.alive()
                    value, more = loss(part)
                    value.backward()
                    sums.update(more)
            return sums

        with self.ranks.working():
            sums = self.retry("update_tokens", gradient)
        sums = self.add_up(sums)
        sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.trainable, grad_clip).item()
        # A loss that is not finite makes the gradient so, and one such step would end the policy.
        sums["skipped"] = int(not math.isfinite(sums["grad_norm"]))
        if not sums["skipped"]:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sums

    def add_up(self, sums: Counter) -> Counter:
        """The ranks' gradients and sums, added. Budgets that one of them had to lower are lowered for all."""
        if self.ranks.size == 1:
            return sums
        parts, has, gen_tokens, update_tokens = zip(*self.ranks.gather(
            (sums, [p.grad is not None for p in self.trainable], self.gen_tokens, self.update_tokens)))
        touched = [p for p, *there in zip(self.trainable, *has) if any(there)]      # what no row went through has none on any rank
        for p in touched:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.ranks.add([p.grad for p in touched])
        self.gen_tokens, self.update_tokens, total = min(gen_tokens), min(update_tokens), Counter[str]()
        for part in parts:
            total.update(part)
        return total

    # ---- 4. Memory -----------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Token budgets that were left open: from two probes of each kind of work, which give its bytes per token. UserError
        if the smaller one, 8 rows to generate or one to update, does not fit into `memory_gib`, or on a CPU one row into what
        is free."""
        cfg = self.cfg
        if cfg.compact:                         # a tiny policy: known, and probes would take longer than its first iteration
            self.gen_tokens, self.update_tokens = self.gen_tokens or 32768, self.update_tokens or 8192
            return
        adam = sum(p.numel() for p in self.trainable) * (2 if cfg.four_bit else 8)      # bytes of optimizer state
        longest: Any = SimpleNamespace(prompt=[0] * cfg.max_prompt, response=[0] * cfg.max_response)
        if self.device == "cpu":
            # Short probes, since a CPU is slow, and one row is at least as long as a budget has to be.
            longest = SimpleNamespace(prompt=[0] * min(cfg.max_prompt, 192), response=[0] * min(cfg.max_response, 64))
            give_back_freed_memory()
            limit = self.spare(free_memory()) + psutil.Process().memory_info().rss
        else:
            total = torch.cuda.get_device_properties().total_memory
            limit = min(cfg.memory_gib * 2**30 or math.inf, self.spare(torch.cuda.mem_get_info()[0]) + torch.cuda.memory_reserved())
            torch.cuda.set_per_process_memory_fraction(limit / total)

        def update(rows: int) -> None:
            self.model.train()
            self.logprobs([longest] * rows)[0].sum().backward()
            self.rest()

        # Two probes of each kind of work are a line: what is taken anyway, and what a token takes more.
        if not self.gen_tokens:
            width = len(longest.prompt)
            # No two prompts alike: equal ones would be read once, and take less memory than those of a rollout may.
            probe = lambda rows: self.answer_all(enumerate(([i, *longest.prompt[1:]], 0) for i in range(rows)), lambda *_: None,
                                                 1.0, 2, rows, width)
            self.gen_tokens = self.budget(probe, PROBE_ROWS, width + 2, SPARE * limit - adam)
        if not self.update_tokens:
            self.update_tokens = self.budget(update, 1, len(longest.prompt) + len(longest.response), SPARE * limit - adam)

    def spare(self, free: float) -> float:
        """This rank's part of what is free, now that all have loaded their model."""
        return min(self.ranks.gather(free)) / self.ranks.sharing

    @contextlib.contextmanager
    def unpacked(self, rows: int, length: int) -> Iterator[None]:
        """While answers are decoded, keep bf16 copies of the 4-bit weights that bitsandbytes would unpack anew in every step of so
        many rows, as far as they fit beside a cache of so many tokens a row. Which those are is measured, once for each shape."""
        room, kept = self.room_beside(rows * length) if self.cfg.four_bit and self.gen_tokens else 0.0, []
        try:
            if room > 0:
                from bitsandbytes.functional import dequantize_4bit
                from bitsandbytes.nn import Linear4bit
                for layer in (module for module in self.model.modules() if isinstance(module, Linear4bit)):
                    shape, size = (rows, layer.in_features, layer.out_features), 2 * layer.in_features * layer.out_features
                    if size > room or self.pays.get(shape) is False:
                        continue
                    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.bfloat16)
                    plain = partial(bf16_linear, weight, layer.bias)
                    if shape not in self.pays:
                        x = torch.ones(rows, layer.in_features, device=self.device, dtype=self.model.dtype)
                        self.pays[shape] = best_time(partial(plain, x)) < 0.8 * best_time(partial(layer, x))
                    if self.pays[shape]:
                        layer.forward, room = plain, room - size
                        kept.append(layer)
            yield
        finally:
            for layer in kept:
                del layer.forward

    def room_beside(self, tokens: int) -> float:
        """Bytes of device memory that are free beside a cache of so many tokens and what else decoding takes; 0 on a CPU."""
        if self.device != "cuda":
            return 0.0
        config, taken = self.model.config.get_text_config(), torch.cuda.memory_allocated()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache = tokens * config.num_hidden_layers * config.num_key_value_heads * width * 2 * 2             # keys and values, bf16
        free = torch.cuda.mem_get_info()[0] / self.ranks.sharing + torch.cuda.memory_reserved() - taken
        return SPARE * min(free, self.cfg.memory_gib * 2**30 - taken if self.cfg.memory_gib else free) - cache - DECODING

    def rest(self) -> None:
        """Drop gradients and leave training mode."""
        self.model.zero_grad(set_to_none=True)
        self.model.eval()

    def budget(self, probe: Callable[[int], Any], rows: int, width: int, usable: float) -> int:
        """Tokens that fit into `usable` bytes, by the peaks of probing `rows` and twice as many rows of `width` tokens.
        UserError if the first probe doesn't fit; if only the second doesn't, the budget is the first one's tokens."""
        cfg = self.cfg

        def peak(n: int) -> float:
            if self.device == "cpu":
                reset_resident_peak()
                probe(n)
                return resident_peak()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            probe(n)
            return torch.cuda.max_memory_allocated()

        try:
            once = peak(rows)
        except torch.OutOfMemoryError as e:
            raise UserError(f"{usable / 2**30:.1f} GiB of device memory can be used: {rows} rows of "
                            f"{cfg.max_prompt + cfg.max_response} tokens do not fit; lower --max-prompt and --max-response"
                            f"{'' if cfg.four_bit else ', or add --4bit'}") from e
        try:
            twice = peak(2 * rows)
        except torch.OutOfMemoryError:
            twice = math.inf
            self.rest()
        if self.device == "cuda":
            return int(rows * width * (1 + max(0, usable - once) / (twice - once)))
        token, row = max(twice - once, 2**16) / (rows * width), cfg.max_prompt + cfg.max_response
        tokens = int((usable - once) / token)
        if tokens < row:
            raise UserError(f"{usable / 2**30:.1f} GiB of memory can be used, the model takes {once / 2**30:.1f}, a row of {row} "
                            f"tokens {row * token / 2**30:.1f}: lower --max-prompt and --max-response, or use a smaller --model")
        return min(tokens, CPU_TOKENS)          # a larger batch is no faster on a CPU

    def retry(self, budget: str, work: Callable[[], Result]) -> Result:
        """Do the work; each time the device or the machine runs out of memory, halve the token budget (`gen_tokens` or
        `update_tokens`) and do it again. UserError once the budget is down to a single row."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as e:
                if not out_of_memory(e):
                    raise
            # Not there: the traceback still holds the tensors.
            tokens = getattr(self, budget)
            if tokens <= self.cfg.max_prompt + self.cfg.max_response:
                raise UserError("out of memory with a single row: lower --max-prompt and --max-response"
                                f"{'' if self.cfg.four_bit else ', or add --4bit'}")
            setattr(self, budget, tokens // 2)
            say(f"     out of memory: {budget} is {tokens // 2} from here on; trying again")


# ---- 5. Helpers ------------------------------------------------------------------------------------------------

def output_head(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """From states to the logits that the model samples with: some architectures scale them, or cap them softly."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    if scale == 1.0 and not cap:
        return head

    def scaled(states: torch.Tensor) -> torch.Tensor:
        logits = head(states) * scale
        return cap * torch.tanh(logits / cap) if cap else logits

    return scaled


def bf16_linear(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """The product of a 4-bit layer with its weights unpacked."""
    return torch.nn.functional.linear(x.bfloat16(), weight, None if bias is None else bias.bfloat16()).to(x.dtype)


@torch.no_grad()
def best_time(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of some tries, the device's included."""
    wait, times = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None, []
    for _ in range(8):
        wait()
        started = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - started)
    return min(times)


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


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what a device or the machine without memory raises, or what came of it: a CUDA graph whose capture runs out
    of memory ends with an error of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or isinstance(error.__context__, torch.OutOfMemoryError))


def free_memory() -> float:
    """Bytes that this process may still take: what the machine has, within the limits of its control group and its own."""
    free = psutil.virtual_memory().available
    for limit, used, cache in (("memory.max", "memory.current", "memory.stat"),
                               ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")):
        try:
            taken, room = (int(Path("/sys/fs/cgroup", name).read_text()) for name in (used, limit))
            kept = re.search(r"^(?:total_)?inactive_file (\d+)", Path("/sys/fs/cgroup", cache).read_text(), re.MULTILINE)
            free = min(free, room - taken + int(kept[1] if kept else 0))
        except (OSError, ValueError):           # no such group, or no limit
            continue
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    if own != resource.RLIM_INFINITY:
        free = min(free, own - psutil.Process().memory_info().vms)
    return max(free, 0)


def give_back_freed_memory() -> None:
    """Have glibc give every large block back when it is freed; by itself it keeps what it hopes to need again, and a CPU's
    peak would be that of all batches together."""
    with contextlib.suppress(AttributeError, OSError):          # another C library
        ctypes.CDLL(None).mallopt(-3, 2**20)                    # M_MMAP_THRESHOLD


def reset_resident_peak() -> None:
    """Set the mark of `resident_peak` to now, where Linux lets it (elsewhere the process must not have held more before)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_peak() -> int:
    """The process's largest resident memory, in bytes. Not from getrusage on Linux, where a child inherits its parent's."""
    if sys.platform == "linux":
        found = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
        return int(found.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss                   # macOS counts bytes


def device_gib() -> float:
    """Memory of the CUDA device, in GiB; 0 without one."""
    return torch.cuda.get_device_properties().total_memory / 2**30 if torch.cuda.is_available() else 0.0


def peak_gib() -> float:
    """Peak memory so far, in GiB: of the device where one is used, else the process's resident memory."""
    if torch.cuda.is_initialized() and (taken := torch.cuda.max_memory_allocated()):
        return taken / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
