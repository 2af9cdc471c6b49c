"""
Compressed request bodies: undone in pieces, and never beyond a limit.

Only zstd, which is all that Ollama takes. A bomb costs as many bytes as the limit says and not one
piece more; other calls run on between the pieces.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Final

from balancer.core.errors import BadRequest

if sys.version_info >= (3, 14):
    from compression.zstd import DecompressionParameter, ZstdDecompressor, ZstdError
else:
    from backports.zstd import DecompressionParameter, ZstdDecompressor, ZstdError

PIECE_BYTES: Final = 1 << 18
MOST_FRAMES: Final = 1000
# Ollama's own limit on what a stream may look back: it is memory that a few bytes can ask for.
WINDOW_LOG: Final = 23
_OPTIONS: Final[dict[int, int]] = {DecompressionParameter.window_log_max: WINDOW_LOG}


async def unzstd(data: bytes | bytearray, max_bytes: int) -> bytes | None:
    """
    The plain body; None: it is longer than *max_bytes*.

    Raises:
        BadRequest: Not zstd, damaged, cut short, or with a window too large.
    """
    parts: list[bytes] = []
    size = position = 0
    frames, decoder = 1, ZstdDecompressor(options=_OPTIONS)
    try:
        while size <= max_bytes:
            if decoder.eof:
                position -= len(decoder.unused_data)
                if position == len(data):
                    return b"".join(parts)
                if frames == MOST_FRAMES:
                    raise BadRequest("failed to decompress request body: too many frames")
                frames, decoder = frames + 1, ZstdDecompressor(options=_OPTIONS)
            piece = data[position : position + PIECE_BYTES] if decoder.needs_input else b""
            if decoder.needs_input and not piece:
                raise BadRequest("unexpected EOF")
            position += len(piece)
            parts.append(decoder.decompress(piece, max_length=PIECE_BYTES))
            size += len(parts[-1])
            await asyncio.sleep(0)
    except ZstdError as error:
        raise BadRequest(f"failed to decompress request body: {error}") from None
    return None
