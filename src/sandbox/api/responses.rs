//! The part of the API that Codex lives on: which workspace, and turns over a WebSocket or as server-sent events.

use futures_util::{SinkExt as _, StreamExt as _};
use http::{Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::create_response;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::super::{Answer, Ask, Body, Crew, error, full, json as answer_json};
use super::{drain, event_stream, named};

/// What every turn ends with.
pub const SAID: &str = "the sandbox says hello";

/// The workspace of the account that asks, which is served from here.
pub(super) async fn accounts(mut request: Ask) -> Answer {
    drain(request.body_mut(), |_| ()).await?;
    let account = request.headers().get("chatgpt-account-id");
    let account = account.and_then(|value| value.to_str().ok()).unwrap_or_default();
    let entry = json!({
        "id": account,
        "workspace_backend_origin": "https://chatgpt.com",
        "account_routing_override": "NO_CONSTRAINT",
    });
    Ok(answer_json(StatusCode::OK, &json!({ "accounts": [entry] })))
}

/// One turn as server-sent events.
pub(super) async fn turn(mut request: Ask) -> Answer {
    drain(request.body_mut(), |_| ()).await?;
    Ok(event_stream(events(true).map(|event| named(&event)).collect()))
}

/// Turns over a WebSocket, one for each `response.create`.
pub(super) fn turns(crew: &Crew, mut request: Ask) -> Response<Body> {
    let upgrade = hyper::upgrade::on(&mut request);
    let Ok(response) = create_response(&request.map(|_| ())) else {
        return error(StatusCode::BAD_REQUEST, "not_a_websocket_handshake");
    };
    crew.spawn(async move {
        let Ok(io) = upgrade.await else { return };
        let io = TokioIo::new(io);
        let mut socket = WebSocketStream::from_raw_socket(io, Role::Server, None).await;
        while let Some(Ok(message)) = socket.next().await {
            let asked: Value = match message.to_text().map(serde_json::from_str) {
                Ok(Ok(asked)) => asked,
                _ => continue,
            };
            // One that warms the connection up asks for no words.
            let speaks = asked["generate"] != Value::Bool(false);
            for event in events(speaks) {
                if socket.send(Message::text(event.to_string())).await.is_err() {
                    return;
                }
            }
        }
    });
    response.map(|()| full(""))
}

fn events(speaks: bool) -> impl Iterator<Item = Value> {
    let content = json!([{ "type": "output_text", "text": SAID }]);
    let item = json!({ "type": "message", "role": "assistant", "id": "msg_1", "content": content });
    let usage = json!({
        "input_tokens": 1, "input_tokens_details": null,
        "output_tokens": 1, "output_tokens_details": null,
        "total_tokens": 2,
    });
    let created = json!({ "type": "response.created", "response": { "id": "resp_1" } });
    let said = json!({ "type": "response.output_item.done", "item": item });
    let response = json!({ "id": "resp_1", "usage": usage });
    let completed = json!({ "type": "response.completed", "response": response });
    [Some(created), speaks.then_some(said), Some(completed)].into_iter().flatten()
}
