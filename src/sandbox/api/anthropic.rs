//! `/v1/messages` as Anthropic's API has it, whole or as events: it says hello, whatever it is asked.

use http::{Response, StatusCode};
use serde_json::{Value, json};

use super::{WORDS, asked, event_stream, named};
use crate::sandbox::{Answer, Ask, Body, json as answer};

/// Answers one request; below `/count_tokens` how long it was.
pub(super) async fn messages(mut request: Ask) -> Answer {
    let asked = asked(&mut request).await?;
    if request.uri().path().ends_with("/count_tokens") {
        return Ok(answer(StatusCode::OK, &json!({"input_tokens": 3})));
    }
    let message = json!({
        "id": "msg_sandbox",
        "type": "message",
        "role": "assistant",
        "model": asked["model"],
        "content": [],
        "stop_reason": null,
        "stop_sequence": null,
        "usage": {"input_tokens": 3, "output_tokens": 1},
    });
    Ok(if asked["stream"] == true { events(&message) } else { whole(message) })
}

fn whole(mut message: Value) -> Response<Body> {
    message["content"] = json!([{"type": "text", "text": WORDS.concat()}]);
    message["stop_reason"] = "end_turn".into();
    answer(StatusCode::OK, &message)
}

fn events(message: &Value) -> Response<Body> {
    let delta = |text: &str| {
        let delta = json!({"type": "text_delta", "text": text});
        json!({"type": "content_block_delta", "index": 0, "delta": delta})
    };
    let start = json!({"type": "text", "text": ""});
    let mut events = vec![
        json!({"type": "message_start", "message": message}),
        json!({"type": "content_block_start", "index": 0, "content_block": start}),
    ];
    events.extend(WORDS.map(delta));
    events.push(json!({"type": "content_block_stop", "index": 0}));
    let end = json!({"stop_reason": "end_turn", "stop_sequence": null});
    events.push(json!({"type": "message_delta", "delta": end, "usage": {"output_tokens": 5}}));
    events.push(json!({"type": "message_stop"}));
    event_stream(events.iter().map(named).collect())
}
