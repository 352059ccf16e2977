"""A gRPC server that says which calls it got, and with which credential."""

import concurrent.futures
import json
import pathlib
import sys
import threading

import grpc

folder = pathlib.Path(sys.argv[1])
ended = {"cancelled": threading.Event(), "late": threading.Event()}


def unary(request, context):
    context.set_trailing_metadata((("x-end", "of unary"),))
    return request


def count(request, context):
    for number in range(int(request)):
        yield b"%d" % number


def total(requests, context):
    return b"%d" % sum(int(request) for request in requests)


def echo(requests, context):
    yield from requests


def fail(request, context):
    context.set_trailing_metadata((("x-why", "because"),))
    context.abort(grpc.StatusCode.NOT_FOUND, "no such thing: 100% gone")


def fail_late(request, context):
    yield b"first"
    context.abort(grpc.StatusCode.DATA_LOSS, "half of it is gone")


def wait(request, context):
    """Says that it has begun, and then nothing until the client has gone."""
    gone = threading.Event()
    context.add_callback(gone.set)
    yield b"begun"
    if gone.wait(20):
        ended[request.decode()].set()


def has_ended(request, context):
    return b"yes" if ended[request.decode()].wait(20) else b"no"


HANDLERS = {
    "Unary": grpc.unary_unary_rpc_method_handler(unary),
    "Count": grpc.unary_stream_rpc_method_handler(count),
    "Total": grpc.stream_unary_rpc_method_handler(total),
    "Echo": grpc.stream_stream_rpc_method_handler(echo),
    "Fail": grpc.unary_unary_rpc_method_handler(fail),
    "FailLate": grpc.unary_stream_rpc_method_handler(fail_late),
    "Wait": grpc.unary_stream_rpc_method_handler(wait),
    "HasEnded": grpc.unary_unary_rpc_method_handler(has_ended),
}


class Peer(grpc.GenericRpcHandler):
    def service(self, details):
        metadata = [[name, str(value)] for name, value in details.invocation_metadata]
        print(json.dumps({"method": details.method, "metadata": metadata}), flush=True)
        return HANDLERS.get(details.method.removeprefix("/test.Peer/"))


pair = ((folder / "server.key").read_bytes(), (folder / "server.pem").read_bytes())
server = grpc.server(
    concurrent.futures.ThreadPoolExecutor(32),
    handlers=[Peer()],
    options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
)
port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
server.start()
print("listening", port, flush=True)
server.wait_for_termination()
