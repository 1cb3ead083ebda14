"""Errors as clients see them: a status and OpenAI's or Anthropic's body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from qcn_compile.errors import CapacityError, QcnError, RankError, UsageError

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}
_ANTHROPIC_TYPES = _TYPES | {404: "not_found_error", 413: "request_too_large"}
_TYPE_TAGS = frozenset({"str", "int", "float", "bool", "dict", "list", "none", "tuple", "json-or-python"})


class ApiError(Exception):
    """A request that gets an error for an answer. `param` is the field at fault, as in `messages[0].content`."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def openai(self) -> dict[str, Any]:
        """OpenAI's error body."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        """Anthropic's error body."""
        kind = _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        message = self.message if self.param is None else f"{self.param}: {self.message}"
        return {"type": "error", "error": {"type": kind, "message": message}}

    def body(self, path: str) -> dict[str, Any]:
        """The body in the shape of the API that a path belongs to."""
        return self.anthropic() if path.startswith("/v1/messages") else self.openai()


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param, code=code or "invalid_value")


def unsupported(what: str, param: str | None) -> ApiError:
    """A 400 for something that exists elsewhere and not here."""
    return ApiError(400, f"not supported: {what}", param=param, code="unsupported_value")


def overloaded(message: str, retry_after: int) -> ApiError:
    """A 503 that says when to come again."""
    return ApiError(503, message, code="overloaded", headers={"Retry-After": str(retry_after)})


def from_runtime(error: BaseException) -> ApiError:
    """What an error of the runtime means to a client. Only expected ones show their message."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, CapacityError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, UsageError):
        return bad_request(str(error))
    detail = str(error) if isinstance(error, QcnError) else type(error).__name__
    status, code = (503, "rank_lost") if isinstance(error, RankError) else (500, "server_error")
    return ApiError(status, f"the server failed: {detail}", code=code)


def from_validation(error: ValidationError) -> ApiError:
    """The first mistake in a body, named by its field."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = _param(first["loc"])
    if first["type"] == "json_invalid":
        return bad_request(f"the body is no JSON: {first['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json")
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    message = first["msg"].removeprefix("Value error, ")
    return bad_request(f"{param}: {message}" if param else message, param, code)


def _param(location: tuple[int | str, ...]) -> str | None:
    """`messages[0].content` from pydantic's path, without the names of union members."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in _TYPE_TAGS and part.replace("_", "").isalnum() and not part[0].isupper():
            text += f".{part}" if text else part
    return text or None
