"""`/v1/audio/transcriptions`: a form with a sound in it, answered with what is said in it."""

from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

from balancer.sim import gojson
from balancer.sim.dialects import PLAIN_JSON, Dialect, Echo, Headers, Outcome, openai_error
from balancer.sim.reading import Body, RefusedError

UNABLE = {
    "code": 400,
    "message": "Multimodal data provided, but model does not support multimodal requests.",
    "type": "invalid_request_error",
}


class Transcription(Dialect):
    """The text, in JSON or bare; a failure on the way leaves nothing at all."""

    loses_errors = True

    def __init__(self, echo: Echo) -> None:
        super().__init__(echo)
        self._bare = echo.request.get("response_format") == "text"
        self.body_headers: Headers = [("Content-Type", "text/plain")] if self._bare else PLAIN_JSON

    def whole(self, outcome: Outcome) -> bytes:
        """The text, without the blanks around it."""
        said = outcome.joined().strip()
        return (said if self._bare else gojson.encode({"text": said}) + "\n").encode()

    def error(self, status: int, text: str) -> tuple[Headers, bytes]:
        """OpenAI's error object."""
        return openai_error(status, text)


def read_form(body: bytes, content_type: str) -> dict[str, Any]:
    """The fields of a form: texts, of a file its bytes. Raises RefusedError."""
    head = f"Content-Type: {content_type}\r\nMIME-Version: 1.0\r\n\r\n".encode("latin-1")
    message = BytesParser(policy=HTTP).parsebytes(head + body)
    if message.get_content_type() != "multipart/form-data":
        why = "failed to parse multipart form: request Content-Type isn't multipart/form-data"
        raise RefusedError(400, why, is_early=True)
    fields: dict[str, Any] = {}
    for part in message.iter_parts():
        name = str(part.get_param("name", "", header="content-disposition"))
        content = part.get_payload(decode=True)
        data = content if isinstance(content, bytes) else b""
        is_file = part.get_filename() is not None
        fields.setdefault(name, data if is_file else data.decode("utf-8", "replace"))
    return fields


def from_transcription(fields: Body) -> Body:
    """A native chat body from a form."""
    if not fields.get("model"):
        raise RefusedError(400, "model is required", is_early=True)
    if not fields.get("file"):
        raise RefusedError(400, "file is required", is_early=True)
    asked = "Transcribe the following audio."
    return {
        "model": fields["model"],
        "stream": False,
        "messages": [{"role": "user", "content": f"{asked} {fields.get('prompt') or ''}"}],
        "audio": True,
    }
