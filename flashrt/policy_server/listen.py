"""Listening: the port that LeRobot's clients connect to, over gRPC.

IS: the four methods of transport.AsyncInference, bytes in and out; errors as status codes; limits
on messages, on calls at a time, and on a stream that stalls. IS NOT: what the calls do (server).
No code is generated and no library for protocol buffers is needed: see messages.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import grpc

from flashrt.base.errors import FlashrtError
from flashrt.policy_server.refusal import Reason, reason_of
from flashrt.policy_server.server import PolicyServer

SERVICE = "transport.AsyncInference"
MOST_CALLS = 32  # at a time, by default; each has a thread, and an observation in the making
MOST_MESSAGE_NBYTES = 4 << 20
STALL_S = 10.0  # for all pieces of an observation
_MOST_DETAILS = 2000  # characters of an error, which travel in a header
_OPTIONS = (
    ("grpc.max_receive_message_length", MOST_MESSAGE_NBYTES),
    ("grpc.max_send_message_length", MOST_MESSAGE_NBYTES),
    ("grpc.so_reuseport", 0),  # else two servers share a port, and clients reach either
)
_LOG = logging.getLogger("flashrt.policy_server")


class Listener:
    """A server at an address. `port`: the one that was taken, where 0 was asked for."""

    def __init__(
        self,
        server: PolicyServer,
        host: str,
        port: int,
        *,
        most_calls: int = MOST_CALLS,
        stall_s: float = STALL_S,
    ) -> None:
        """Binds at once. Raises FlashrtError where that cannot be done."""
        self._server, self._stall_s = server, stall_s
        pool = ThreadPoolExecutor(most_calls, thread_name_prefix="flashrt-policy")
        self._grpc = grpc.server(pool, options=_OPTIONS, maximum_concurrent_rpcs=most_calls)
        one, many = grpc.unary_unary_rpc_method_handler, grpc.stream_unary_rpc_method_handler
        handlers = {
            "Ready": one(self._ready),
            "SendPolicyInstructions": one(self._instruct),
            "SendObservations": many(self._observe),
            "GetActions": one(self._actions),
        }
        self._grpc.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port: int = self._grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise FlashrtError(f"cannot listen on {address}: {error}") from error
        if not self.port:
            raise FlashrtError(f"cannot listen on {address}")

    def start(self) -> None:
        """Take calls from here on."""
        self._grpc.start()

    def stop(self, grace_s: float = 2.0) -> None:
        """Take none any more; those that are there have `grace_s` seconds to end."""
        stopped = self._grpc.stop(grace_s)
        self._server.close()
        stopped.wait()

    # -- the methods -------------------------------------------------------------------------------

    def _ready(self, request: bytes, context: Any) -> bytes:
        return _answered(context, lambda: self._server.ready(context.peer()))

    def _instruct(self, request: bytes, context: Any) -> bytes:
        return _answered(context, lambda: self._server.instruct(context.peer(), request))

    def _observe(self, pieces: Iterator[bytes], context: Any) -> bytes:
        timer = threading.Timer(self._stall_s, context.cancel)
        timer.daemon = True
        timer.start()
        try:
            return _answered(context, lambda: self._server.observe(context.peer(), pieces))
        finally:
            timer.cancel()

    def _actions(self, request: bytes, context: Any) -> bytes:
        return _answered(
            context,
            lambda: self._server.actions(context.peer(), context.is_active, context.add_callback),
        )


def _answered(context: Any, call: Callable[[], bytes]) -> bytes:
    try:
        return call()
    except FlashrtError as error:
        _abort(context, reason_of(error), str(error))
    except grpc.RpcError:  # the client broke off
        _abort(context, Reason.INVALID_ARGUMENT, "the call broke off")
    except Exception:
        if not context.is_active():
            _abort(context, Reason.INVALID_ARGUMENT, "the call broke off")
        _LOG.exception("%s: an error of the server", context.peer())
        _abort(context, Reason.INTERNAL, "an error of the server; its log says more")


def _abort(context: Any, reason: Reason, message: str) -> NoReturn:
    context.abort(grpc.StatusCode[reason], message[:_MOST_DETAILS])
    raise AssertionError  # abort has raised
