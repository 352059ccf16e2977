"""An HTTP/2 client on Python's h2, with small windows, through the proxy that its environment names."""

import os
import socket
import ssl
import urllib.parse

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, DataReceived, ResponseReceived, StreamEnded, StreamReset, TrailersReceived
from h2.settings import SettingCodes

HOST = "api.example.com"


class Client:
    def __init__(self):
        proxy = urllib.parse.urlsplit(os.environ["HTTPS_PROXY"])
        plain = socket.create_connection((proxy.hostname, proxy.port))
        plain.settimeout(30)
        plain.sendall(f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: {HOST}:443\r\n\r\n".encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += plain.recv(1)
        assert head.startswith(b"HTTP/1.1 200 "), head
        tls = ssl.create_default_context()
        tls.set_alpn_protocols(["h2"])
        self.stream = tls.wrap_socket(plain, server_hostname=HOST)
        assert self.stream.selected_alpn_protocol() == "h2"
        self.h2 = H2Connection(H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 2000})
        self.answers = {}
        self.flush()

    def ask(self, path, body=b"", trailers=(), extra=(), method="POST"):
        """Sends a request as far as the windows let it; gives its stream."""
        stream = self.h2.get_next_available_stream_id()
        self.answers[stream] = {"body": b"", "fields": {}, "trailers": {}, "end": None}
        pseudo = [(":method", method), (":scheme", "https"), (":authority", HOST), (":path", path)]
        self.h2.send_headers(stream, pseudo + list(extra), end_stream=method == "GET")
        while body:
            room = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)
            if room <= 0:
                self.read()
                continue
            self.h2.send_data(stream, body[:room])
            body = body[room:]
        if trailers:
            self.h2.send_headers(stream, trailers, end_stream=True)
        elif method != "GET":
            self.h2.end_stream(stream)
        self.flush()
        return stream

    def read(self):
        self.flush()
        data = self.stream.recv(65536)
        assert data, "the connection ended"
        for event in self.h2.receive_data(data):
            assert not isinstance(event, ConnectionTerminated), event
            answer = self.answers.get(getattr(event, "stream_id", None))
            if isinstance(event, ResponseReceived):
                answer["fields"] = dict(event.headers)
            elif isinstance(event, DataReceived):
                answer["body"] += event.data
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, TrailersReceived):
                answer["trailers"] = dict(event.headers)
            elif isinstance(event, StreamEnded):
                answer["end"] = "whole"
            elif isinstance(event, StreamReset):
                answer["end"] = event.error_code
        self.flush()

    def end(self, stream):
        """Waits for the end of an answer."""
        while self.answers[stream]["end"] is None:
            self.read()
        return self.answers[stream]

    def flush(self):
        self.stream.sendall(self.h2.data_to_send())


client = Client()
own = [("authorization", "Bearer of-the-client"), ("te", "trailers"), ("cookie", "a=1"), ("cookie", "b=2")]
echoed = client.end(client.ask("/v1/echo", b"hello", [("x-sum", "5")], own))
assert (echoed["fields"][":status"], echoed["body"], echoed["end"]) == ("200", b"hello", "whole"), echoed
assert echoed["trailers"] == {"x-sum": "5", "x-end": "of /v1/echo"}, echoed

# Both ways through windows of two or three thousand bytes.
big = bytes(range(256)) * 400
assert client.end(client.ask("/v1/echo", big))["body"] == big
assert len(client.end(client.ask("/v1/bytes/300000"))["body"]) == 300000

# Ten at once, where the server allows four.
many = [client.ask(f"/v1/bytes/{number * 1000}") for number in range(10)]
for number, stream in enumerate(many):
    answer = client.end(stream)
    assert (len(answer["body"]), answer["end"]) == (number * 1000, "whole"), answer

# A stream that the server gives up in the middle ends as a reset, and none of its neighbours does.
half, whole = client.ask("/v1/reset"), client.ask("/v1/bytes/5000")
assert client.end(half)["end"] == ErrorCodes.ENHANCE_YOUR_CALM, client.answers[half]
assert client.end(whole)["end"] == "whole"

refused = client.end(client.ask("/v1/refused-once", method="GET"))
print("refused", refused["fields"].get(":status"))

# A stream that the client gives up ends at the server.
wait = client.ask("/v1/wait")
while client.answers[wait]["body"] != b"begun":
    client.read()
client.h2.reset_stream(wait, ErrorCodes.CANCEL)
client.flush()

# After a GOAWAY of the server's, the same client goes on, on the same connection.
gone = client.end(client.ask("/v1/go-away"))
assert gone["fields"][":status"] == "200", gone
for _ in range(3):
    after = client.end(client.ask("/v1/echo", b"after"))
    assert (after["fields"][":status"], after["body"]) == ("200", b"after"), after
print("done")
