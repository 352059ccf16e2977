"""An HTTP/2 server on Python's h2, with small windows and few streams, that misbehaves as its paths ask."""

import json
import pathlib
import socket
import ssl
import sys
import threading

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, DataReceived, RequestReceived
from h2.events import StreamEnded, StreamReset, TrailersReceived
from h2.settings import SettingCodes

refused_once = threading.Event()


def say(**facts):
    print(json.dumps(facts), flush=True)


class Connection:
    def __init__(self, stream):
        self.stream = stream
        self.h2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        self.requests = {}
        self.sending = {}

    def run(self):
        few = {SettingCodes.INITIAL_WINDOW_SIZE: 3000, SettingCodes.MAX_CONCURRENT_STREAMS: 4}
        # Once this is acknowledged, one stream too many ends the connection: h2 sees to that.
        self.h2.initiate_connection()
        self.h2.update_settings(few)
        self.flush()
        while data := self.stream.recv(65536):
            for event in self.h2.receive_data(data):
                if isinstance(event, ConnectionTerminated):
                    return
                self.take(event)
            self.push()
            self.flush()

    def take(self, event):
        if isinstance(event, RequestReceived):
            fields = [list(pair) for pair in event.headers]
            say(stream=event.stream_id, fields=fields)
            path = dict(fields)[":path"]
            self.requests[event.stream_id] = {"path": path, "body": b"", "trailers": []}
            if path == "/v1/wait":
                self.h2.send_headers(event.stream_id, [(":status", "200")])
                self.h2.send_data(event.stream_id, b"begun")
        elif isinstance(event, DataReceived):
            self.requests[event.stream_id]["body"] += event.data
            self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, TrailersReceived):
            self.requests[event.stream_id]["trailers"] = event.headers
        elif isinstance(event, StreamReset):
            path = self.requests.pop(event.stream_id, {}).get("path")
            self.sending.pop(event.stream_id, None)
            say(reset=path, code=int(event.error_code))
        elif isinstance(event, StreamEnded):
            self.answer(event.stream_id)

    def answer(self, stream):
        request = self.requests[stream]
        path = request["path"]
        if path == "/v1/wait":
            return
        if path == "/v1/refused-once" and not refused_once.is_set():
            refused_once.set()
            self.requests.pop(stream)
            self.h2.reset_stream(stream, ErrorCodes.REFUSED_STREAM)
            return
        if path == "/v1/reset":
            self.requests.pop(stream)
            self.h2.send_headers(stream, [(":status", "200")])
            self.h2.send_data(stream, b"half")
            self.h2.reset_stream(stream, ErrorCodes.ENHANCE_YOUR_CALM)
            return
        self.h2.send_headers(stream, [(":status", "200"), ("x-path", path)])
        body = request["body"]
        if path.startswith("/v1/bytes/"):
            body = b"b" * int(path.rsplit("/", 1)[1])
        self.sending[stream] = [body, request["trailers"] + [("x-end", "of " + path)]]
        if path == "/v1/go-away":
            self.push()
            self.h2.close_connection()

    def push(self):
        """Sends what the windows let through."""
        for stream in list(self.sending):
            body, trailers = self.sending[stream]
            while body:
                room = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)
                if room <= 0:
                    break
                self.h2.send_data(stream, body[:room])
                body = body[room:]
            self.sending[stream][0] = body
            if not body:
                self.h2.send_headers(stream, trailers, end_stream=True)
                self.sending.pop(stream)
                self.requests.pop(stream)

    def flush(self):
        self.stream.sendall(self.h2.data_to_send())


folder = pathlib.Path(sys.argv[1])
tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
tls.load_cert_chain(folder / "server.pem", folder / "server.key")
tls.set_alpn_protocols(["h2"])
listener = socket.create_server(("127.0.0.1", 0))
print("listening", listener.getsockname()[1], flush=True)


def serve(plain):
    try:
        with tls.wrap_socket(plain, server_side=True) as stream:
            say(connection=stream.selected_alpn_protocol())
            Connection(stream).run()
    except (OSError, ssl.SSLError):
        pass


while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
