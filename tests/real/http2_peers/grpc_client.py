"""A gRPC client, unmodified: its environment alone leads it through the proxy."""

import queue

import grpc

channel = grpc.secure_channel(
    "api.example.com:443",
    grpc.ssl_channel_credentials(),
    options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
)


def method(kind, name):
    return getattr(channel, kind)("/test.Peer/" + name)


unary = method("unary_unary", "Unary")
has_ended = method("unary_unary", "HasEnded")


def status_of(call):
    try:
        call()
    except grpc.RpcError as error:
        return error
    raise AssertionError("it did not fail")


# This stream is older than all others, and outlives them.
messages = queue.Queue()
long = method("stream_stream", "Echo")(iter(messages.get, None), timeout=60)
messages.put(b"first")
assert next(long) == b"first"

answer, call = unary.with_call(b"hello", timeout=20)
assert answer == b"hello"
assert dict(call.trailing_metadata())["x-end"] == "of unary"
assert unary(b"", timeout=20) == b""
own = (("authorization", "Bearer of-the-client"), ("x-own", "kept"), ("x-own-bin", b"\x00\xff"))
assert unary(b"hello", metadata=own, timeout=20) == b"hello"

numbers = list(method("unary_stream", "Count")(b"200", timeout=20))
assert numbers == [b"%d" % number for number in range(200)]
assert method("stream_unary", "Total")(iter([b"1", b"20", b"300"]), timeout=20) == b"321"
both = method("stream_stream", "Echo")(iter([b"a", b"", b"c"]), timeout=20)
assert list(both) == [b"a", b"", b"c"]

failed = status_of(lambda: method("unary_unary", "Fail")(b"", timeout=20))
assert failed.code() == grpc.StatusCode.NOT_FOUND, failed
assert failed.details() == "no such thing: 100% gone", failed
assert dict(failed.trailing_metadata())["x-why"] == "because", failed
half = method("unary_stream", "FailLate")(b"", timeout=20)
assert next(half) == b"first"
failed = status_of(lambda: next(half))
assert (failed.code(), failed.details()) == (grpc.StatusCode.DATA_LOSS, "half of it is gone")
failed = status_of(lambda: method("unary_unary", "NoSuch")(b"", timeout=20))
assert failed.code() == grpc.StatusCode.UNIMPLEMENTED, failed

big = bytes(range(256)) * (4 * 1024 * 1024 // 256)
assert unary(big, timeout=40) == big

wait = method("unary_stream", "Wait")
waiting = wait(b"cancelled", timeout=60)
assert next(waiting) == b"begun"
waiting.cancel()
assert has_ended(b"cancelled", timeout=30) == b"yes"
waiting = wait(b"late", timeout=1)
assert next(waiting) == b"begun"
failed = status_of(lambda: next(waiting))
assert failed.code() == grpc.StatusCode.DEADLINE_EXCEEDED, failed
assert has_ended(b"late", timeout=30) == b"yes"

calls = [unary.future(b"%d" % number, timeout=30) for number in range(100)]
assert [call.result() for call in calls] == [b"%d" % number for number in range(100)]

messages.put(b"last")
assert next(long) == b"last"
messages.put(None)
assert list(long) == []
assert long.code() == grpc.StatusCode.OK
channel.close()
print("done")
