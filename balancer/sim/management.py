"""What changes a host's disk: pull, push, create, copy, delete, blobs.

A `Store` is a directory of models; hosts of one machine may share it. A `Registry` is where
models are pulled from. Downloads take time by `Registry.bytes_per_s`, are shared by all who ask
for the same layer, stop when the last of them has gone, and go on later where they stopped.

    shelf = Registry([SimModel("llama3.2")], bytes_per_s=1e9)
    SimOllama([], registry=shelf)
    sim.management.store.breaks = "no space left on device"     # the next download ends so
"""

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from balancer.sim import dialects, gojson, names
from balancer.sim.delivery import Delivery, Site
from balancer.sim.host import SimModel
from balancer.sim.inference import decoded
from balancer.sim.reading import RefusedError

TICK_S = 0.06
"""Between two records of a download."""
STEP_S = 0.001
_NDJSON = [("Content-Type", "application/x-ndjson")]
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_NO_BODY = "missing request body"
_CONFIG_BYTES = 284
_DEFAULT_TEMPLATE = SimModel("x").template

Record = dict[str, Any]
Steps = Iterator[tuple[float, Record | None]]
"""Seconds to wait, then what to write."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A file of a model."""

    digest: str
    size_bytes: int

    @property
    def short(self) -> str:
        """As progress lines call it."""
        return self.digest[7:19]


def _sha256(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def layers(model: SimModel) -> list[Layer]:
    """The files of a model: weights, then template, licence and parameters if it has them."""
    template = "" if model.template == _DEFAULT_TEMPLATE else model.template
    parameters = json.dumps(dict(model.parameters)) if model.parameters else ""
    texts = [text for text in (template, model.license, parameters) if text]
    small = [Layer(_sha256(text), len(text.encode())) for text in texts]
    return [Layer(model.weights, model.size_bytes), *small]


def config(model: SimModel) -> Layer:
    """The file that names the others."""
    return Layer(_sha256(f"config {model.digest}"), _CONFIG_BYTES)


class Registry:
    """Where models are pulled from, and pushed to."""

    def __init__(self, models: Iterable[SimModel] = (), *, bytes_per_s: float = 1e9) -> None:
        self.bytes_per_s = bytes_per_s
        self.is_reachable = True
        self._models = {model.parsed.key: model for model in models}

    def find(self, name: str) -> SimModel | None:
        """The model of that name."""
        return self._models.get(names.parse(name).key)

    def add(self, model: SimModel) -> None:
        """Offers a model, in a new version if the name is known."""
        self._models[model.parsed.key] = model


class _Download:
    """One layer on its way to one store."""

    def __init__(self, layer: Layer, begun: int, bytes_per_s: float, now: float) -> None:
        self.layer = layer
        self.watchers = 0
        self._begun = begun
        self._bytes_per_s = bytes_per_s
        self._since = now

    def completed(self, now: float) -> int:
        """Bytes here."""
        fresh = int((now - self._since) * self._bytes_per_s)
        return min(self.layer.size_bytes, self._begun + fresh)


class Store:
    """A directory of models."""

    def __init__(self) -> None:
        self.blobs: dict[str, int] = {}
        """Size by digest."""
        self.partial: dict[str, int] = {}
        """Bytes of downloads that were broken off."""
        self.breaks = ""
        """How the next download ends halfway, if it does."""
        self.downloads: dict[str, _Download] = {}

    def keep(self, model: SimModel) -> None:
        """Has the files of a model."""
        for layer in (*layers(model), config(model)):
            self.blobs[layer.digest] = layer.size_bytes


class Management:
    """The handlers of one host."""

    def __init__(self, site: Site, store: Store, registry: Registry) -> None:
        self._site = site
        self.store = store
        self.registry = registry
        for model in site.host.models:
            store.keep(model)

    # -- streams of progress --------------------------------------------------------------------

    def pull(self, delivery: Delivery) -> None:
        """`POST /api/pull`."""
        self._work(delivery, lambda body: self._pulled(_named(body, "invalid model name")))

    def push(self, delivery: Delivery) -> None:
        """`POST /api/push`."""
        self._work(delivery, lambda body: self._pushed(_named(body, "model is required")))

    def create(self, delivery: Delivery) -> None:
        """`POST /api/create`."""
        self._work(delivery, self._created)

    def _work(self, delivery: Delivery, begin: Callable[[Record], Steps]) -> None:
        try:
            body = dict(decoded(delivery.seen.body, _NO_BODY))
            delivery.seen.model = str(body.get("model") or body.get("name") or "")
            steps = begin(body)
        except RefusedError as error:
            _refuse(delivery, error)
            return
        streams = body.get("stream") is not False
        _Progress(self._site.loop, delivery, steps, streams=streams).go()

    def _pulled(self, name: str) -> Steps:
        yield STEP_S, {"status": "pulling manifest"}
        yield from self._fetched(name)
        yield STEP_S, {"status": "success"}

    def _fetched(self, name: str) -> Steps:
        parsed = names.parse(name)
        if not self.registry.is_reachable:
            place = f"{parsed.host}/v2/{parsed.namespace}/{parsed.model}/manifests/{parsed.tag}"
            told = f"dial tcp {parsed.host}: connect: connection refused"
            raise RefusedError(500, f'pull model manifest: Get "http://{place}": {told}')
        model = self.registry.find(name)
        if model is None:
            raise RefusedError(500, "pull model manifest: file does not exist")
        for layer in (*layers(model), config(model)):
            yield from self._downloaded(layer)
        yield STEP_S, {"status": "verifying sha256 digest"}
        yield STEP_S, {"status": "writing manifest"}
        self.store.keep(model)
        self._site.host.add(replace(model, name=name))

    def _downloaded(self, layer: Layer) -> Steps:
        if layer.digest in self.store.blobs:
            yield STEP_S, _progress("pulling", layer, layer.size_bytes)
            return
        download = self._join(layer)
        download.watchers += 1
        half = layer.size_bytes // 2
        try:
            told = False
            while (done := download.completed(self._site.now())) < layer.size_bytes:
                if self.store.breaks and done >= half:
                    broken, self.store.breaks = self.store.breaks, ""
                    raise RefusedError(500, broken)
                left_s = (layer.size_bytes - done) / self.registry.bytes_per_s
                if done:
                    told = True
                    yield 0.0, _progress("pulling", layer, done)
                yield min(TICK_S, left_s + 1e-6), None
            self.store.blobs[layer.digest] = layer.size_bytes
            if not told:
                yield 0.0, _progress("pulling", layer, 0)
        finally:
            self._leave(download)

    def _join(self, layer: Layer) -> _Download:
        running = self.store.downloads.get(layer.digest)
        if running is None:
            begun = self.store.partial.pop(layer.digest, 0)
            now = self._site.now()
            running = _Download(layer, begun, self.registry.bytes_per_s, now)
            self.store.downloads[layer.digest] = running
        return running

    def _leave(self, download: _Download) -> None:
        download.watchers -= 1
        if not download.watchers:
            del self.store.downloads[download.layer.digest]
            if download.layer.digest not in self.store.blobs:
                done = download.completed(self._site.now())
                self.store.partial[download.layer.digest] = done

    def _pushed(self, name: str) -> Steps:
        model = self._site.host.find(name)
        yield STEP_S, {"status": "retrieving manifest"}
        if model is None:
            yield STEP_S, {"status": "couldn't retrieve manifest"}
            raise RefusedError(500, "file does not exist")
        for layer in (*layers(model), config(model)):
            yield TICK_S, _progress("pushing", layer, layer.size_bytes)
        yield STEP_S, {"status": "pushing manifest"}
        self.registry.add(model)
        yield STEP_S, {"status": "success"}

    def _created(self, body: Record) -> Steps:
        name = _named(body, "invalid model name")
        files = body.get("files") or {}
        if not body.get("from") and not files:
            raise RefusedError(400, "neither 'from' or 'files' was specified")
        base = body.get("from")
        yield from self._based(name, str(base), body) if base else self._built(name, files, body)
        yield STEP_S, {"status": "writing manifest"}
        yield STEP_S, {"status": "success"}

    def _based(self, name: str, base: str, body: Record) -> Steps:
        model = self._site.host.find(base)
        if model is None:
            yield STEP_S, {"status": "pulling manifest"}
            yield from self._fetched(base)
            model = self._site.host.find(base)
        if model is None:
            raise RefusedError(500, "file does not exist")
        for layer in layers(model):
            yield STEP_S, {"status": f"using existing layer {layer.digest}"}
        yield from self._finished(_changed(replace(model, name=name, content=model.origin), body))

    def _built(self, name: str, files: dict[str, str], body: Record) -> Steps:
        yield STEP_S, {"status": "parsing GGUF"}
        for digest in files.values():
            if digest not in self.store.blobs:
                path = f"/var/lib/ollama/models/blobs/{digest.replace(':', '-')}"
                raise RefusedError(500, f"open {path}: no such file or directory")
        yield STEP_S, {"status": "verifying conversion"}
        for digest in files.values():
            yield STEP_S, {"status": f"using existing layer {digest}"}
        yield STEP_S, {"status": "using autodetected template chatml"}
        first = next(iter(files.values()))
        size = sum(self.store.blobs[digest] for digest in files.values())
        made = SimModel(name, size_bytes=size, content=" ".join(files.values()), blob=first)
        yield from self._finished(_changed(replace(made, template="chatml"), body))

    def _finished(self, model: SimModel) -> Steps:
        for layer in layers(model):
            if layer.digest not in self.store.blobs:
                yield STEP_S, {"status": f"creating new layer {layer.digest}"}
        self.store.keep(model)
        self._site.host.add(model)

    # -- whole answers --------------------------------------------------------------------------

    def copy(self, delivery: Delivery) -> None:
        """`POST /api/copy`."""
        self._do(delivery, self._copied)

    def delete(self, delivery: Delivery) -> None:
        """`DELETE /api/delete`; a loaded model stays loaded."""
        self._do(delivery, self._deleted)

    @staticmethod
    def _do(delivery: Delivery, act: Callable[[Record], None]) -> None:
        try:
            body = dict(decoded(delivery.seen.body, _NO_BODY))
            delivery.seen.model = str(body.get("model") or body.get("name") or "")
            act(body)
        except RefusedError as error:
            _refuse(delivery, error)
        else:
            delivery.reply(200, [])

    def _copied(self, body: Record) -> None:
        source = _valid(str(body.get("source") or ""), "source")
        destination = _valid(str(body.get("destination") or ""), "destination")
        model = self._site.host.find(source)
        if model is None:
            raise RefusedError(404, f'model "{source}" not found')
        self._site.host.add(replace(model, name=destination, content=model.origin))

    def _deleted(self, body: Record) -> None:
        name = str(body.get("model") or body.get("name") or "")
        if not name.strip():
            raise RefusedError(400, "model is required")
        if self._site.host.find(_valid(name, "name")) is None:
            raise RefusedError(404, f"model '{name}' not found")
        self._site.host.remove(name)

    # -- blobs ----------------------------------------------------------------------------------

    def has_blob(self, delivery: Delivery) -> None:
        """`HEAD /api/blobs/:digest`."""
        digest = self._digest(delivery)
        if digest is None:
            return
        if digest in self.store.blobs:
            delivery.start(200, [], "none")
            delivery.finish()
        else:
            path = f"/var/lib/ollama/models/blobs/{digest.replace(':', '-')}"
            gone = RefusedError(404, f"stat {path}: no such file or directory")
            _refuse(delivery, gone)

    def take_blob(self, delivery: Delivery) -> None:
        """`POST /api/blobs/:digest`: what is there already is not read."""
        digest = self._digest(delivery)
        if digest is None:
            return
        if digest in self.store.blobs:
            delivery.reply(200, [])
            return
        exchange = delivery.exchange
        found, size = hashlib.sha256(), 0

        def more(data: bytes) -> None:
            nonlocal size
            found.update(data)
            size += len(data)

        def end() -> None:
            got = f"sha256:{found.hexdigest()}"
            if got == digest:
                self.store.blobs[digest] = size
                delivery.reply(201, [])
            else:
                told = f'digest mismatch, expected "{digest}", got "{got}"'
                _refuse(delivery, RefusedError(400, told))

        exchange.on_body, exchange.on_body_end = more, end
        exchange.go_on()

    @staticmethod
    def _digest(delivery: Delivery) -> str | None:
        match = _DIGEST.fullmatch(delivery.seen.path.removeprefix("/api/blobs/"))
        if match is None:
            _refuse(delivery, RefusedError(400, "invalid digest format"))
            return None
        return f"sha256:{match[1]}"


class _Progress:
    """Records on their way out, one after the other; closed when the client goes."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, delivery: Delivery, steps: Steps, *, streams: bool
    ) -> None:
        self._loop = loop
        self._delivery = delivery
        self._steps = steps
        self._streams = streams
        self._timer: asyncio.TimerHandle | None = None
        delivery.on_gone = self._stop

    def go(self) -> None:
        """Takes the next step."""
        try:
            wait_s, record = next(self._steps)
        except StopIteration:
            self._end({"status": "success"})
            return
        except RefusedError as error:
            self._fail(error)
            return
        self._timer = self._loop.call_later(wait_s, self._tell, record)

    def _tell(self, record: Record | None) -> None:
        if self._delivery.exchange.ended:
            self._stop()
            return
        if record is not None and self._streams:
            self._write(record)
        self.go()

    def _write(self, record: Record) -> None:
        if not self._delivery.exchange.started:
            self._delivery.start(200, _NDJSON)
        self._delivery.write(gojson.encode(record).encode() + b"\n")

    def _end(self, record: Record) -> None:
        if self._streams:
            self._delivery.finish()
        else:
            body = gojson.encode(record).encode()
            self._delivery.reply(200, dialects.PLAIN_JSON, body)

    def _fail(self, error: RefusedError) -> None:
        record = {"error": error.text}
        if self._delivery.exchange.started:
            self._write(record)
            self._delivery.finish()
        elif self._streams:
            self._delivery.start(error.status, dialects.PLAIN_JSON)
            self._delivery.write(gojson.encode(record).encode())
            self._delivery.finish()
        else:
            body = gojson.encode(record).encode()
            self._delivery.reply(error.status, dialects.PLAIN_JSON, body)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with closing(self._steps):  # type: ignore[type-var]
            pass


def _named(body: Record, unnamed: str) -> str:
    name = str(body.get("model") or body.get("name") or "")
    if not name.strip():
        raise RefusedError(400, unnamed)
    try:
        names.parse(name)
    except names.BadNameError:
        raise RefusedError(400, "invalid model name") from None
    return name


def _valid(name: str, field: str) -> str:
    try:
        names.parse(name)
    except names.BadNameError:
        raise RefusedError(400, f'{field} "{name}" is invalid') from None
    return name


def _changed(model: SimModel, body: Record) -> SimModel:
    """With what a Modelfile adds, which makes other weights of it as far as digests go."""
    added = {
        key: body[key] for key in ("template", "system", "parameters", "license") if key in body
    }
    if not added:
        return model
    parameters = tuple((str(k), str(v)) for k, v in (body.get("parameters") or {}).items())
    return replace(
        model,
        template=str(body.get("template") or model.template),
        license=str(body.get("license") or model.license),
        parameters=parameters or model.parameters,
        content=f"{model.origin} {json.dumps(added, sort_keys=True)}",
        blob=model.weights,
    )


def _progress(verb: str, layer: Layer, completed: int) -> Record:
    record: Record = {"status": f"{verb} {layer.short}", "digest": layer.digest}
    record["total"] = layer.size_bytes
    return record | ({"completed": completed} if completed else {})


def _refuse(delivery: Delivery, error: RefusedError) -> None:
    body = gojson.encode({"error": error.text}).encode()
    delivery.reply(error.status, dialects.JSON, body)
