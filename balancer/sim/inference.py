"""Requests for inference: from the body to the last byte of the answer."""

import base64
import math
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from balancer.sim import audio, dialects, gojson, names, reading, text
from balancer.sim.anthropic import Messages, from_messages
from balancer.sim.cloud import Cloud
from balancer.sim.delivery import Delivery, Site
from balancer.sim.dialects import Dialect, Echo, Outcome
from balancer.sim.host import Call, Job, Phase, Refusal, SimModel
from balancer.sim.reading import Body, Kind, RefusedError, Wanted
from balancer.sim.responses import Responses, from_responses

if TYPE_CHECKING:
    import asyncio
if sys.version_info >= (3, 14):
    from compression.zstd import ZstdError, decompress
else:
    from backports.zstd import ZstdError, decompress

_BLOCK = 64  # characters that the prompt cache compares as one
_UNLIMITED_CONTEXTS = 10
_NO_EMBEDDINGS = "This server does not support embeddings. Start it with `--embeddings`"
_EMPTY_MESSAGE = {"role": "assistant", "content": ""}


def ns_of(seconds: float) -> int:
    """Whole nanoseconds."""
    return round(seconds * 1e9)


def _unzipped(body: bytes) -> bytes:
    try:
        return decompress(body)
    except (ZstdError, EOFError):
        text = "failed to decompress request body"
        raise RefusedError(400, text, is_native=True) from None


def decoded(body: bytes, empty: str) -> Body:
    """A request body; `empty` is the complaint if there is none. Raises RefusedError."""
    if not body:
        raise RefusedError(400, empty, is_early=True)
    try:
        return gojson.decode(body)
    except gojson.DecodeError as error:
        raise RefusedError(400, str(error), is_early=True) from None


def resolve(
    site: Site, name: str, unnamed: RefusedError, missing: Callable[[str], RefusedError]
) -> SimModel:
    """The installed model of that name; raises RefusedError."""
    if not name.strip():
        raise unnamed
    try:
        parsed = names.parse(name)
    except names.BadNameError:
        raise RefusedError(400, "invalid model name") from None
    if parsed.source == "cloud":
        cloud = "ollama cloud is disabled: remote model is unavailable"
        raise RefusedError(403, cloud, is_native=True)
    model = site.host.find(name)
    if model is None:
        raise missing(name)
    return model


class Reply:
    """One call on the host and its answer on the way out.

    `body_of` makes the body of an answer that is no text; `context_ints` is the length of the
    `context` in the last record, None if there is none.
    """

    def __init__(
        self,
        site: Site,
        delivery: Delivery,
        dialect: Dialect,
        answer: text.Answer,
        *,
        stream: bool,
        body_of: Callable[[Call], bytes] | None = None,
        context_ints: int | None = None,
    ) -> None:
        self._site = site
        self._delivery = delivery
        self._dialect = dialect
        self._answer = answer
        self._stream = stream
        self._body_of = body_of
        self._context_ints = context_ints
        self._sent = 0
        self._timer: asyncio.TimerHandle | None = None
        self._call: Call | None = None

    def start(self, job: Job) -> None:
        """Hands the job to the host."""
        self._delivery.on_gone = self._hang_up
        self._delivery.exchange.on_drain = self._pump
        self._call = self._site.host.submit(job, self._changed)

    def _hang_up(self) -> None:
        self._unschedule()
        if self._call is not None:
            self._site.host.cancel(self._call)

    def _changed(self, call: Call) -> None:
        self._call = call
        if call.phase in {Phase.DECODE, Phase.ENDED}:
            self._pump()

    def _pump(self) -> None:
        """Sends the tokens that are due, then waits for the next one or ends."""
        self._unschedule()
        call = self._call
        if call is None or call.ending == "gone" or self._delivery.exchange.ended:
            return
        produced = call.produced(self._site.now()) if self._stream else 0
        while self._sent < produced and not self._delivery.exchange.paused:
            self._open()
            for chunk in self._dialect.piece(self._answer.pieces[self._sent]):
                self._delivery.write(chunk)
            self._sent += 1
        if self._sent < produced:
            return
        if call.ended:
            self._finish(call)
        elif self._stream and not math.isinf(due := call.due_at(self._sent + 1)):
            self._timer = self._site.loop.call_at(due, self._pump)

    def _unschedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _open(self) -> None:
        if not self._delivery.exchange.started:
            self._delivery.start(200, self._dialect.stream_headers)
            for chunk in self._dialect.opening():
                self._delivery.write(chunk)

    # -- ends -----------------------------------------------------------------------------------

    def _finish(self, call: Call) -> None:
        if call.ending == "refused" and call.refusal is not None:
            self._refuse(call.refusal)
        elif call.ending == "down":
            self._delivery.cut("down")
        elif self._body_of is not None:
            self._delivery.reply(200, self._dialect.body_headers, self._body_of(call))
        elif self._stream and (call.job.kind == "run" or not self._is_native):
            self._finish_stream(call)
        else:
            self._finish_whole(call)

    @property
    def _is_native(self) -> bool:
        """Native routes answer a load with one object though a stream was asked for."""
        return isinstance(self._dialect, dialects.Native)

    def _refuse(self, refusal: Refusal) -> None:
        headers, body = self._dialect.error(refusal.status, refusal.text)
        if not refusal.in_stream:
            self._delivery.reply(refusal.status, headers, body)
            return
        self._delivery.start(refusal.status, dialects.PLAIN_JSON)
        self._delivery.write(body)
        self._delivery.finish()

    def _finish_stream(self, call: Call) -> None:
        self._open()
        if call.ending == "cut":
            self._delivery.cut()
        elif call.ending == "reset":
            self._delivery.reset()
        else:
            for chunk in self._last_chunks(call):
                self._delivery.write(chunk)
            self._delivery.finish()

    def _last_chunks(self, call: Call) -> list[bytes]:
        if call.ending == "error":
            return self._dialect.broken(call.fault.text if call.fault else "")
        if call.ending == "no_done" or not self._answer.done_reason:
            return []
        return self._dialect.closing(self._outcome(call))

    def _finish_whole(self, call: Call) -> None:
        if call.ending == "cut":
            self._delivery.cut()
        elif call.ending == "reset":
            self._delivery.reset()
        elif call.ending == "error" and self._dialect.loses_errors:
            self._delivery.reply(200, [])
        elif call.ending == "error":
            self._refuse(Refusal(500, call.fault.text if call.fault else ""))
        else:
            body = self._dialect.whole(self._outcome(call))
            self._delivery.reply(200, self._dialect.body_headers, body)

    def _outcome(self, call: Call) -> Outcome:
        pieces = self._answer.pieces[: call.limit]
        reason = "" if call.ending == "no_done" else self._answer.done_reason
        if call.job.kind == "load":
            return Outcome(pieces, "load")
        ints = self._context_ints
        outcome = Outcome(
            pieces,
            reason,
            call.job.prompt_tokens,
            context=range(1000, 1000 + ints) if ints is not None else None,
        )
        outcome.metrics = {
            "total_duration": ns_of(call.total_s),
            "load_duration": ns_of(call.load_s),
            "prompt_eval_count": call.job.prompt_tokens,
            "prompt_eval_duration": ns_of(call.prompt_s),
            "eval_count": outcome.tokens,
            "eval_duration": ns_of(call.eval_s),
        }
        return outcome


@dataclass(frozen=True, slots=True)
class Route:
    """How an inference route differs from the others."""

    dialect: type[Dialect]
    kind: Kind
    streams: bool
    empty_body: str
    translate: Callable[[Body], Body] | None = None

    def missing(self, model: str) -> RefusedError:
        """The model is not installed."""
        if self.kind in {"generate", "chat"}:
            return RefusedError(404, f"model '{model}' not found")
        return RefusedError(404, f'model "{model}" not found, try pulling it first')

    def unnamed(self) -> RefusedError:
        """No model was named."""
        if self.kind in {"generate", "embed"}:
            return RefusedError(404, "model '' not found")
        return RefusedError(400, "model is required")


NO_BODY, _EOF = "missing request body", "EOF"
ROUTES: Mapping[str, Route] = {
    "/api/generate": Route(dialects.Generate, "generate", True, NO_BODY),
    "/api/chat": Route(dialects.Chat, "chat", True, NO_BODY),
    "/api/embed": Route(dialects.Embed, "embed", False, NO_BODY),
    "/api/embeddings": Route(dialects.Embed, "embeddings", False, NO_BODY),
    "/v1/chat/completions": Route(
        dialects.V1Chat, "chat", False, _EOF, reading.from_v1_chat
    ),
    "/v1/completions": Route(
        dialects.V1Completions, "generate", False, _EOF, reading.from_v1_completions
    ),
    "/v1/messages": Route(Messages, "chat", False, _EOF, from_messages),
    "/v1/responses": Route(Responses, "chat", False, _EOF, from_responses),
    "/v1/embeddings": Route(
        dialects.V1Embeddings, "embed", False, _EOF, reading.from_v1_embeddings
    ),
    "/v1/audio/transcriptions": Route(
        audio.Transcription, "chat", False, "", audio.from_transcription
    ),
}  # fmt: skip


class Inference:
    """One request for inference, understood and handed to the host."""

    def __init__(self, site: Site, delivery: Delivery) -> None:
        self._site = site
        self._delivery = delivery
        self._route = ROUTES[delivery.seen.path]
        self._dialect = self._route.dialect(self._echo("", {}))

    def begin(self) -> None:
        """Answers at once, or as the host gets on with it."""
        try:
            wanted, model = self._understand()
            cloud = self._site.cloud
            if cloud is not None and model is cloud.model:
                self._pass_on(cloud, wanted)
            elif wanted.is_embedding:
                self._embed(wanted, model)
            else:
                self._write(wanted, model)
        except gojson.DecodeError as error:
            self._delivery.reply(400, *self._dialect.early_error(400, str(error)))
        except RefusedError as error:
            self._refuse(error)

    def _pass_on(self, cloud: Cloud, wanted: Wanted) -> None:
        """Answers as ollama.com would; what is cut there ends cleanly, as Ollama passes it on."""
        delivery, dialect = self._delivery, self._dialect
        if cloud.against is not None:
            status, body = cloud.against
            delivery.reply(status, dialects.JSON, body.encode())
            return
        answer = self._answer(wanted, cloud.model, wanted.prompt(reopens=False), thinks=False)
        pieces = answer.pieces[: cloud.cut_after]
        outcome = Outcome(pieces, answer.done_reason, 1, {"eval_count": len(pieces)})
        if not wanted.stream:
            delivery.reply(200, dialect.body_headers, dialect.whole(outcome))
            return
        delivery.start(200, dialect.stream_headers)
        written = [chunk for piece in pieces for chunk in dialect.piece(piece)]
        last = [] if cloud.cut_after is not None else dialect.closing(outcome)
        for chunk in (*dialect.opening(), *written, *last):
            delivery.write(chunk)
        delivery.finish()

    def _refuse(self, error: RefusedError) -> None:
        if error.is_native:
            self._reply_json({"error": error.text}, error.status)
        elif error.is_early:
            answer = self._dialect.early_error(error.status, error.text)
            self._delivery.reply(error.status, *answer)
        else:
            self._delivery.reply(error.status, *self._dialect.error(error.status, error.text))

    def _understand(self) -> tuple[Wanted, SimModel]:
        route, seen = self._route, self._delivery.seen
        sent = self._sent()
        seen.model = str(sent.get("model") or "")
        native = route.translate(sent) if route.translate else sent
        wanted = reading.read(native, route.kind, streams=route.streams)
        if self._site.cloud is not None and names.is_cloud(wanted.model):
            model = self._site.cloud.model
        else:
            model = resolve(self._site, wanted.model, route.unnamed(), route.missing)
        self._dialect = route.dialect(self._echo(wanted.model, sent, jinja=model.jinja))
        return wanted, model

    def _sent(self) -> Body:
        request, path = self._delivery.exchange.request, self._delivery.seen.path
        body = request.body
        if path == "/v1/audio/transcriptions":
            return audio.read_form(body, request.get("content-type") or "")
        if path.startswith("/v1/") and request.get("content-encoding") == "zstd":
            body = _unzipped(body)
        return decoded(body, self._route.empty_body)

    def _echo(self, model: str, body: Body, *, jinja: bool = False) -> Echo:
        return Echo(model, self._site.wall_ns, self._site.rng, body, jinja)

    def _reply_json(self, value: object, status: int = 200) -> None:
        self._delivery.reply(status, dialects.JSON, gojson.encode(value).encode())

    def _num_ctx(self, wanted: Wanted, model: SimModel) -> int:
        return wanted.num_ctx(model, self._site.host.settings.context_length)

    def _job(self, wanted: Wanted, model: SimModel, prompt: str, output_tokens: int = 0) -> Job:
        kind: Literal["run", "embed"] = "embed" if wanted.is_embedding else "run"
        return Job(
            wanted.model,
            prompt_tokens=text.count_tokens(prompt),
            output_tokens=output_tokens,
            kind="load" if wanted.is_empty else kind,
            keep_alive_s=wanted.keep_alive_s,
            options=wanted.runner_options(),
            num_ctx=self._num_ctx(wanted, model),
            blocks=tuple(prompt[at : at + _BLOCK] for at in range(0, len(prompt), _BLOCK)),
            refusal=_refusal(wanted, model, prompt, self._num_ctx(wanted, model)),
        )

    # -- text -----------------------------------------------------------------------------------

    def _write(self, wanted: Wanted, model: SimModel) -> None:
        if wanted.is_empty and wanted.keep_alive_s == 0:
            self._site.host.unload(wanted.model)
            unloaded = self._dialect.whole(Outcome((), "unload"))
            self._delivery.reply(200, dialects.JSON, unloaded)
            return
        thinks = _check_capabilities(model, self._route, wanted)
        reading.check_options(wanted.options)
        prompt = wanted.prompt(reopens=model.reopens)
        if wanted.body.get("_debug_render_only"):
            self._debug_render(wanted, prompt)
            return
        answer, dialect = self._answer(wanted, model, prompt, thinks=thinks), self._dialect
        if model.chunks is not None and not wanted.is_empty:
            dialect = dialects.Verbatim(dialect, model.chunks)
        job = self._job(wanted, model, prompt, len(answer.pieces))
        ints = None
        if wanted.kind == "generate" and not wanted.body.get("raw"):
            tokens = job.prompt_tokens + len(answer.pieces)
            ints = tokens if model.context_ints is None else model.context_ints
        reply = Reply(
            self._site,
            self._delivery,
            dialect,
            answer,
            stream=wanted.stream,
            context_ints=ints,
        )
        reply.start(job)

    def _answer(self, wanted: Wanted, model: SimModel, prompt: str, *, thinks: bool) -> text.Answer:
        if wanted.is_empty:
            return text.Answer((), "stop")
        if model.chunks is not None:
            return text.Answer(tuple(text.Piece("") for _ in model.chunks), "stop")
        schema = reading.wanted_schema(wanted.body.get("format"))
        ask = text.Ask(
            prompt,
            wanted.question,
            seed=int(wanted.options.get("seed") or 0),
            limit=min(wanted.limit or math.inf, _UNLIMITED_CONTEXTS * self._num_ctx(wanted, model)),
            tools=wanted.tools,
            schema=schema if isinstance(schema, dict) else None,
            thinks=thinks,
            prefix=self._site.prefix,
        )
        return text.answer(model, ask)

    def _debug_render(self, wanted: Wanted, prompt: str) -> None:
        empty = {"response": ""} if wanted.kind == "generate" else {"message": _EMPTY_MESSAGE}
        answer = {
            "model": wanted.model,
            "created_at": gojson.timestamp(self._site.wall_ns()),
            **empty,
            "done": False,
            "_debug_info": {"rendered_template": prompt},
        }
        self._reply_json(answer)

    # -- vectors --------------------------------------------------------------------------------

    def _embed(self, wanted: Wanted, model: SimModel) -> None:
        reading.check_options(wanted.options)
        inputs = wanted.inputs
        dimensions = wanted.body.get("dimensions") or None
        vectors = [_plain(text.vector(model, given, dimensions)) for given in inputs]
        reply = Reply(
            self._site,
            self._delivery,
            self._dialect,
            text.Answer((), "stop"),
            stream=False,
            body_of=lambda call: self._vectors_body(vectors, call),
        )
        reply.start(self._job(wanted, model, "".join(inputs)))

    def _vectors_body(self, vectors: Sequence[Sequence[float]], call: Call) -> bytes:
        if self._route.kind == "embeddings":
            return gojson.encode({"embedding": vectors[0] if vectors else []}).encode()
        if self._route.translate:
            return _v1_vectors(self._dialect.echo, vectors, call.job.prompt_tokens)
        body: dict[str, Any] = {"model": self._dialect.echo.model, "embeddings": vectors}
        if vectors:
            body["total_duration"] = ns_of(call.total_s)
            body["load_duration"] = ns_of(call.load_s)
            body["prompt_eval_count"] = call.job.prompt_tokens
        return gojson.encode({name: value for name, value in body.items() if value != 0}).encode()


def _check_capabilities(model: SimModel, route: Route, wanted: Wanted) -> bool:
    """Refuses what the model cannot do; returns whether it will think."""
    body, full = wanted.body, model.parsed.full
    if "completion" not in model.capabilities:
        raise RefusedError(400, f'"{wanted.model}" does not support {route.kind}')
    if body.get("suffix") and "insert" not in model.capabilities:
        raise RefusedError(400, f"{full} does not support insert")
    if body.get("tools") and "tools" not in model.capabilities:
        raise RefusedError(400, f"{full} does not support tools")
    think = reading.wanted_thinking(body)
    if think and "thinking" not in model.capabilities:
        raise RefusedError(400, f'"{wanted.model}" does not support thinking')
    return think is not False


def _refusal(wanted: Wanted, model: SimModel, prompt: str, num_ctx: int) -> Refusal | None:
    """What the engine says instead of an answer, once the model is loaded."""
    if wanted.is_embedding:
        if "embedding" in model.capabilities:
            return None
        return Refusal(501 if wanted.kind == "embed" else 500, _NO_EMBEDDINGS)
    if wanted.body.get("audio") and "audio" not in model.capabilities:
        return Refusal(400, gojson.encode({"error": audio.UNABLE}), in_stream=True)
    unfit = reading.unfit_format(wanted.body.get("format"))
    if unfit:
        return Refusal(500, unfit, in_stream=True)
    if model.jinja and wanted.last_roles == ["assistant", "assistant"]:
        two = "Cannot have 2 or more assistant messages at the end of the list."
        return _engine_refusal(two, "invalid_request_error")
    tokens = text.count_tokens(prompt)
    if tokens > num_ctx and wanted.body.get("truncate") is False:
        return _engine_refusal(
            f"request ({tokens} tokens) exceeds the available context size ({num_ctx} tokens), "
            "try increasing it",
            "exceed_context_size_error",
            n_prompt_tokens=tokens,
            n_ctx=num_ctx,
        )
    return None


def _engine_refusal(message: str, kind: str, **more: int) -> Refusal:
    error = {"code": 400, "message": message, "type": kind, **more}
    return Refusal(400, gojson.encode({"error": error}))


def _plain(vector: Sequence[float]) -> list[float]:
    """Go prints whole floats without a point."""
    return [int(value) if value == int(value) else value for value in vector]


def _v1_vectors(echo: Echo, vectors: Sequence[Sequence[float]], tokens: int) -> bytes:
    as_base64 = echo.request.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "embedding": _packed(v) if as_base64 else v, "index": index}
        for index, v in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    answer = {"object": "list", "data": data, "model": echo.model, "usage": usage}
    return gojson.encode(answer).encode() + b"\n"


def _packed(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
