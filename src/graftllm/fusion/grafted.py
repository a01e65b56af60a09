"""GraftedModel: a live base, its packs and its router; each conversation is answered with the pack it asks for."""

import atexit
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Literal, cast, get_args
from weakref import WeakSet

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftllm.errors import FusionError
from graftllm.fusion.beside import Beside, Mix, mixed
from graftllm.fusion.branches import kept_branches, why_merged_only
from graftllm.fusion.conversations import Conversation, messages_of, several
from graftllm.fusion.decoding import is_quantized
from graftllm.fusion.features import prompt_features
from graftllm.fusion.manifest import AUTO, open_base, open_shelf
from graftllm.fusion.names import unknown_pack
from graftllm.fusion.routes import BASE, UNRULED, Route, ruled
from graftllm.fusion.routing import Router
from graftllm.fusion.rules import Rule, first_fitting
from graftllm.fusion.shelf import Shelf, default_limit
from graftllm.fusion.switching import Switch
from graftllm.fusion.turns import Turn
from graftllm.fusion.voices import Voice, Voices
from graftllm.generation import GREEDY, generate, stream
from graftllm.loading import load_model, load_tokenizer
from graftllm.recipe import SamplingOptions
from graftllm.records import Message
from graftllm.skillpack import SkillPack

Wanted = str | Mapping[str, float] | None  # a pack, several with weights, or the base
Way = Literal["auto", "merged", "beside"]


@dataclass(eq=False, repr=False)
class GraftedModel:
    """A live base model that answers with any of its packs.

    Threads take turns: one answers, streams or is inside `using` at a time, the others wait.

    Attributes:
        model: the live base.
        tokenizer: the base's; what a pack is spoken to by is in `voices`.
        packs: by name, memory-mapped; other packs make another GraftedModel.
        router: None where `auto` cannot be asked for.
        rules: prompts that go to a pack whatever the router says.
        unrouted: packs that came, or changed, after the router was trained.
        digests: the SHA-256 of each pack's file, by name, as it was loaded.
        shelf: what is decoded of the packs; by default as large as the base, or 1 GiB, as far as memory goes.
        voices: the tokenizer, chat template and end tokens of the base and of each pack.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    packs: Mapping[str, SkillPack]
    router: Router | None = None
    rules: Sequence[Rule] = ()
    unrouted: Sequence[str] = ()
    shelf: Shelf | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    _turn: Turn = field(default_factory=Turn)
    _sizes: dict[str, int] = field(default_factory=dict)  # bytes of packs beside the weights, where known

    def __post_init__(self) -> None:
        """Start with the bare base."""
        self.packs = MappingProxyType(dict(self.packs))
        if self.shelf is None:
            self.shelf = Shelf(default_limit(self.model))
        self.voices = Voices(self.model, self.tokenizer, self.packs)
        self.beside = Beside(self.model, self.packs, self.shelf)
        self._switch, self._streaming = Switch(self.model, self.packs, self.shelf), False

    def __repr__(self) -> str:
        """Return the model in one line."""
        return (
            f"GraftedModel({type(self.model).__name__} {self.model.name_or_path!r}, packs {list(self.packs)}, "
            f"{'a' if self.router else 'no'} router, {len(self.rules)} rules)"
        )

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        device: str = "auto",
        model: PreTrainedModel | None = None,
        memory_bytes: int | None = None,
        check: bool = True,
    ) -> "GraftedModel":
        """Load the base and open the packs of a grafted directory.

        Args:
            directory: as `graftllm fuse` writes it.
            device: `auto` takes a GPU when there is one.
            model: the base, if you loaded it yourself, such as over several devices or quantized.
            memory_bytes: how much of decoded packs may be kept; see `shelf`.
            check: compare all weights in the base's files with the manifest's fingerprint first.

        Raises:
            FusionError: the directory is no grafted model, or a file of it or the base was changed.
            CheckpointError: the base is missing or cannot be loaded.
            PackError: a pack is damaged or was made for another base.
        """
        directory = Path(directory)
        manifest, packs, router = open_shelf(directory)
        base = open_base(directory, manifest, check=check)
        for pack in packs.values():
            pack.check_base(base)
        return cls(
            load_model(base.path, device=device) if model is None else model,
            load_tokenizer(base.path),
            packs,
            router=router,
            rules=manifest.rules,
            unrouted=manifest.unrouted() if router else (),
            shelf=None if memory_bytes is None else Shelf(memory_bytes),
            digests={name: pack.sha256 for name, pack in manifest.packs.items()},
        )

    @contextmanager
    def using(self, pack: Wanted) -> Iterator[PreTrainedModel]:
        """Merge a pack, or several with weights, into the model for a `with` block; afterwards it is what it was.

        The weights are the shelf's, or the base's memory: read them, train on a copy. A stream that was begun in the
        block and is still open goes on with its pack; the model is what it was when that is read or closed.

        Raises:
            FusionError: there is no such pack, or this thread has a stream open.
            PackError: the pack does not fit the base model.
        """
        mix = mixed(pack, self.packs)
        with self._turn.taken():
            if self._streaming:
                raise FusionError("a stream of this model is still open; read it to its end, or close it, first.")
            with self._switch.during(mix):
                yield self.model

    def route(self, conversations: Iterable[Conversation]) -> list[Route]:
        """Return which pack would answer each conversation: by the first rule that fits, else by the router.

        Where there are rules and no router, it is the base if none fits.

        Raises:
            FusionError: there is neither router nor rule; or no rule fits, and the router is older than a pack.
        """
        messages = [messages_of(conversation) for conversation in several(conversations)]
        routes = [ruled(rule.pack) if (rule := first_fitting(self.rules, one)) else None for one in messages]
        undecided = [i for i, route in enumerate(routes) if route is None]
        for i, route in zip(undecided, self._routed([messages[i] for i in undecided]), strict=True):
            routes[i] = route
        return cast(list[Route], routes)

    def _routed(self, messages: Sequence[Sequence[Message]]) -> list[Route]:
        if not messages:
            return []
        if self.router is None and self.rules:
            return [UNRULED] * len(messages)
        if self.router is None:
            raise FusionError(
                f"pack: {AUTO!r} needs a router, and this grafted model has none; "
                "name a pack, or fuse with --router-data."
            )
        if self.unrouted:
            raise FusionError(
                f"pack: {AUTO!r} needs a router that knows every pack, and this one is older than "
                f"{', '.join(self.unrouted)}; name a pack, or `graftllm add` these once more, with --router-data."
            )
        with self.using(BASE) as base:
            features = prompt_features(base, self.tokenizer, messages, layer=self.router.options.layer)
        return [self._alone(route) for route in self.router.route(features)]

    def _alone(self, route: Route) -> Route:
        """Return a route; to the strongest pack alone where vocabularies or dtypes differ: such have no sum."""
        if len(route.weights) < 2:
            return route
        headers = [self.packs[name].header for name in route.weights]
        specs = [{name: one.tuned_spec for name, one in header.tensors.items()} for header in headers]
        return route if all(one == specs[0] for one in specs) else replace(route, weights={route.name: 1.0})

    def generate(
        self,
        conversations: Iterable[Conversation],
        pack: Wanted | Sequence[Wanted] = AUTO,
        options: SamplingOptions = GREEDY,
        *,
        way: Way = "auto",
        seed: int = 0,
    ) -> list[str]:
        """Answer conversations, each with the pack it asks for.

        Args:
            conversations: strings (one user message each) or lists of messages.
            pack: a pack's name, `base` or None, `auto` (the router chooses), a mapping of names to weights,
                or one of these for each conversation.
            options: decoding; one answer each.
            way: `merged` answers the conversations of one pack after those of another, with its weights in place;
                `beside` answers all of them in common batches. `auto` does so where the base is quantized, or there are
                several packs, if all of them can and the shelf's limit has room for them.
            seed: of the draws when the temperature is above 0.

        Raises:
            FusionError: a name or way is unknown, a conversation has no message or is no conversation, `auto` is asked
                for without router and rules, packs that can only be merged shall run beside the weights, or more than
                one answer each is asked for.
        """
        if options.samples > 1:
            raise FusionError(f"samples: expected 1, as each conversation gets one answer; found {options.samples}.")
        if way not in get_args(Way):
            raise FusionError(f"way: expected one of {', '.join(get_args(Way))}; found {way!r}.")
        messages = [messages_of(conversation) for conversation in several(conversations)]
        mixes = self._chosen(messages, pack)
        beside = self._goes_beside(mixes, way)
        groups: dict[tuple[Voice, Mix], list[int]] = {}
        for i, mix in enumerate(mixes):
            groups.setdefault((self.voices.of(dict(mix)), () if beside else mix), []).append(i)
        answers = [""] * len(messages)
        for (voice, merged), mine in groups.items():
            rows = [dict(mixes[i]) for i in mine] if beside else None
            texts = self._answered([messages[i] for i in mine], voice, merged, rows, options, seed)
            for i, text in zip(mine, texts, strict=True):
                answers[i] = text
        return answers

    def _answered(
        self,
        messages: Sequence[Sequence[Message]],
        voice: Voice,
        merged: Mix,
        rows: Sequence[Mapping[str, float]] | None,
        options: SamplingOptions,
        seed: int,
    ) -> list[str]:
        """Answer conversations of one voice, with packs that are merged or those of each row beside the weights."""
        with self.using(dict(merged)) as model:
            try:
                texts = generate(
                    model, voice.tokenizer, messages, options, ends=voice.ends, seed=seed,
                    around=lambda some: nullcontext() if rows is None else self.beside.rows([rows[i] for i in some]),
                )  # fmt: skip
            finally:
                self._let_go()
        return [samples[0] for samples in texts]

    def stream(
        self, conversation: Conversation, pack: Wanted = AUTO, options: SamplingOptions = GREEDY
    ) -> Iterator[str]:
        """Return the answer to one conversation piece by piece; read it to its end or close it to let others answer.

        Raises:
            FusionError: when it is read, the pack's name is unknown, or `auto` is asked for without router and rules.
        """
        begun = self._streamed(conversation, pack, options)
        _BEGUN.add(begun)
        return begun

    def _streamed(self, conversation: Conversation, pack: Wanted, options: SamplingOptions) -> Generator[str]:
        mix = self._chosen([messages_of(conversation)], [pack])[0]
        beside, voice = self._goes_beside([mix], "auto"), self.voices.of(dict(mix))
        with self.using(BASE if beside else dict(mix)) as model:
            self._streaming = True
            try:
                with self.beside.rows([dict(mix)]) if beside else nullcontext():
                    for piece in stream(model, voice.tokenizer, messages_of(conversation), options, ends=voice.ends):
                        yield piece
                        self._turn.passed()  # another thread may go on with the stream
            finally:
                self._let_go()
                self._streaming = False

    @cached_property
    def _is_quantized(self) -> bool:
        return any(is_quantized(value) for value in self.model.parameters())

    @property
    def chooses(self) -> bool:
        """Whether `auto` can be asked for: there is a router, or a rule."""
        return self.router is not None or bool(self.rules)

    def merged_only(self, name: str) -> str | None:
        """Return in one line why a pack can only be merged, and what to do; None if it can run beside the weights.

        Raises:
            FusionError: there is no such pack.
        """
        if name not in self.packs:
            raise unknown_pack(name, self.packs)
        with self._turn.taken():  # while another thread answers, modules may hold other parameters than the base's
            return why_merged_only(self.model, self.packs[name])

    def _goes_beside(self, mixes: Sequence[Mix], way: Way) -> bool:
        """Return whether conversations with these packs are answered beside the weights."""
        names = list(dict.fromkeys(name for mix in mixes for name, _ in mix))
        if way == "beside":
            self._refuse_merged_only(names)
            return True
        if way == "merged" or not names or not (self._is_quantized or len(set(mixes)) > 1):
            return False
        return not any(map(self.merged_only, names)) and (self._is_quantized or self._fit(names))

    def _fit(self, names: Sequence[str]) -> bool:
        """Return whether the shelf's limit has room for all of these packs at once; decodes those it knows not yet."""
        assert self.shelf is not None
        for name in (name for name in names if name not in self._sizes):
            with self.using(BASE) as model:
                found = kept_branches(self.shelf, name, model, self.packs[name], check=True)
            self._sizes[name] = found.nbytes
        return sum(self._sizes[name] for name in names) <= self.shelf.limit_bytes

    def _let_go(self) -> None:
        """Keep nothing of packs that ran beside the weights where that is more than may be kept."""
        assert self.shelf is not None
        if self.beside.nbytes > self.shelf.limit_bytes:
            self.beside.close()

    def _refuse_merged_only(self, names: Sequence[str]) -> None:
        reasons = {name: reason for name in names if (reason := self.merged_only(name))}
        if reasons:
            first = next(iter(reasons))
            raise FusionError(
                f"{', '.join(map(repr, reasons))}: expected packs that can run beside the weights; {reasons[first]}"
            )

    def _chosen(self, messages: Sequence[Sequence[Message]], pack: Wanted | Sequence[Wanted]) -> list[Mix]:
        """Return the packs of each conversation; the router chooses where that is wanted."""
        wanted: list[Wanted]
        if pack is None or isinstance(pack, str | Mapping | SkillPack):
            wanted = [cast(Wanted, pack)] * len(messages)
        else:
            wanted = list(pack) if isinstance(pack, Iterable) else [pack]
        if odd := [one for one in wanted if one is not None and not isinstance(one, str | Mapping)]:
            raise FusionError(f"pack: expected a name, None, or names with weights, found {odd[0]!r}.")
        if len(wanted) != len(messages):
            raise FusionError(f"pack: expected one for each of {len(messages)} conversations, found {len(wanted)}.")
        for one in wanted:
            if one != AUTO:
                mixed(one, self.packs, also=(BASE, AUTO) if isinstance(one, str) else (BASE,))
        undecided = [i for i, one in enumerate(wanted) if one == AUTO]
        if undecided:
            for i, route in zip(undecided, self.route([messages[i] for i in undecided]), strict=True):
                wanted[i] = route.weights
        return [mixed(one, self.packs) for one in wanted]


_BEGUN: WeakSet[Generator[str]] = WeakSet()  # streams


@atexit.register
def _close() -> None:
    """Close the streams that nobody reads to their end, while what unplugs their packs is still there."""
    for one in list(_BEGUN):
        with suppress(ValueError):  # another thread reads on
            one.close()
