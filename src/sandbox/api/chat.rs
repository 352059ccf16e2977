//! `/v1/chat/completions` and `/v1/realtime` as OpenAI's API has them: both say hello, whatever they are asked.

use futures_util::{Sink, SinkExt as _, Stream, StreamExt as _};
use http::StatusCode;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::{WORDS, asked, event_stream};
use crate::sandbox::{Answer, Ask, json as answer};

/// Answers one request, whole or as events.
pub(super) async fn completions(mut request: Ask) -> Answer {
    let asked = asked(&mut request).await?;
    if asked["stream"] != true {
        let message = json!({"role": "assistant", "content": WORDS.concat(), "refusal": null});
        let choice = json!({"index": 0, "message": message, "finish_reason": "stop"});
        return Ok(answer(StatusCode::OK, &completion("chat.completion", &asked, &choice)));
    }
    let chunk = |delta: Value, reason: Option<&str>| {
        let choice = json!({"index": 0, "delta": delta, "finish_reason": reason});
        format!("data: {}\n\n", completion("chat.completion.chunk", &asked, &choice))
    };
    let words = WORDS.map(|word| chunk(json!({"role": "assistant", "content": word}), None));
    let end = [chunk(json!({}), Some("stop")), "data: [DONE]\n\n".to_owned()];
    Ok(event_stream(words.into_iter().chain(end).collect()))
}

fn completion(object: &str, asked: &Value, choice: &Value) -> Value {
    json!({
        "id": "chatcmpl-sandbox",
        "object": object,
        "created": 1_700_000_000,
        "model": asked["model"],
        "choices": [choice],
    })
}

/// Talks on a WebSocket until the other side closes it: to every `response.create` it says hello.
pub(super) async fn realtime<S>(mut socket: S)
where
    S: Stream<Item = Result<Message, Error>> + Sink<Message> + Unpin,
{
    let session = json!({"id": "sess_sandbox", "object": "realtime.session", "type": "realtime"});
    let mut events = vec![json!({"type": "session.created", "session": session})];
    loop {
        for (number, mut event) in events.drain(..).enumerate() {
            event["event_id"] = format!("event_{number}").into();
            if socket.send(Message::text(event.to_string())).await.is_err() {
                return;
            }
        }
        let Some(Ok(message)) = socket.next().await else { return };
        let asked: Value = serde_json::from_slice(&message.into_data()).unwrap_or_default();
        if asked["type"] == "response.create" {
            events.extend(WORDS.map(|word| {
                json!({"type": "response.output_text.delta", "response_id": "resp_sandbox",
                    "item_id": "item_sandbox", "output_index": 0, "content_index": 0, "delta": word})
            }));
            let response = json!({"id": "resp_sandbox", "object": "realtime.response",
                "status": "completed", "output": []});
            events.push(json!({"type": "response.done", "response": response}));
        }
    }
}
