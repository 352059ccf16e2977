//! The makers' own clients of their APIs, with a key that is worth nothing, against APIs that answer in their words.

use std::fs;

use valetkey::sandbox::Settings;

use super::support::{KEY, Scene, node_modules, packaged, python_with};

/// What the sandbox says, whatever it is asked.
const HELLO: &str = "hello from the sandbox";

/// What a tool shows that must have a key to start: it looks like one.
const WORTHLESS: &str = "sk-worthless-0123456789abcdef0123456789abcdef";

/// A home whose login is an API key of OpenAI's.
async fn with_api_key() -> Scene {
    let scene = Scene::usual().await.with("OPENAI_API_KEY", WORTHLESS);
    let login = format!(r#"{{"auth_mode":"apikey","OPENAI_API_KEY":"{KEY}"}}"#);
    fs::write(scene.path(".codex/auth.json"), login).unwrap();
    scene
}

#[tokio::test(flavor = "multi_thread")]
async fn openai_for_python() {
    let Some(python) = python_with("openai") else { return };
    let scene = with_api_key().await;
    let script = r#"
from openai import OpenAI
client = OpenAI()
ask = {"model": "gpt-sandbox", "messages": [{"role": "user", "content": "hello?"}]}
print(client.chat.completions.create(**ask).choices[0].message.content)
chunks = client.chat.completions.create(stream=True, **ask)
print("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
with client.realtime.connect(model="gpt-realtime") as connection:
    connection.response.create()
    said = ""
    for event in connection:
        if event.type == "response.output_text.delta":
            said += event.delta
        if event.type == "response.done":
            break
    print(said)
"#;
    let done = scene.run_ok(&[&python, "-c", script]).await;
    assert_eq!(done.out, format!("{HELLO}\n").repeat(3), "{done:?}");
    assert_eq!(scene.seen_signed_in().len(), 3);
}

/// On a Node that reads `NODE_USE_ENV_PROXY`. The package `ws`, which the WebSocket is made with, is given Node's own
/// agent, for it makes connections by itself otherwise.
#[tokio::test(flavor = "multi_thread")]
async fn openai_for_node() {
    let (Some(node), Some(modules)) = (packaged("node"), node_modules()) else { return };
    let scene = with_api_key().await;
    let script = format!(
        r#"
const {{ OpenAI }} = require("{modules}/openai");
const {{ OpenAIRealtimeWS }} = require("{modules}/openai/realtime/ws");
const {{ globalAgent }} = require("https");
(async () => {{
  const client = new OpenAI();
  const ask = {{ model: "gpt-sandbox", messages: [{{ role: "user", content: "hello?" }}] }};
  console.log((await client.chat.completions.create(ask)).choices[0].message.content);
  let said = "";
  for await (const chunk of await client.chat.completions.create({{ ...ask, stream: true }}))
    said += chunk.choices[0].delta.content ?? "";
  console.log(said);
  const socket = new OpenAIRealtimeWS({{ model: "gpt-realtime", options: {{ agent: globalAgent }} }}, client);
  said = "";
  socket.on("session.created", () => socket.send({{ type: "response.create" }}));
  socket.on("response.output_text.delta", (event) => {{ said += event.delta; }});
  socket.on("response.done", () => {{ console.log(said); socket.close(); }});
  socket.on("error", (error) => {{ console.error(error); process.exit(1); }});
}})().catch((error) => {{ console.error(error); process.exit(1); }});
"#
    );
    let done = scene.run_ok(&[&node, "-e", &script]).await;
    assert_eq!(done.out, format!("{HELLO}\n").repeat(3), "{done:?}");
    assert_eq!(scene.seen_signed_in().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn claude_code() {
    let Some(claude) = packaged("claude") else { return };
    let mut settings = Settings::default();
    settings.hosts.push("api.anthropic.com".to_owned());
    let scene = Scene::in_world(settings, time::Duration::hours(1)).await;
    // Nothing else goes anywhere.
    let config = format!(
        "default = \"refuse\"\n[credentials.anthropic]\nkind = \"api_key\"\nsource = \"env:EXAMPLE_TOKEN\"\n\
         [[rules]]\nhost = \"api.anthropic.com\"\ncredential = \"anthropic\"\n\
         headers = {{ x-api-key = \"{{token}}\" }}\nremove = [\"Authorization\"]\n{}",
        scene.world.upstream_toml()
    );
    fs::write(scene.path(".config/valetkey/config.toml"), config).unwrap();
    let scene = scene.with("ANTHROPIC_API_KEY", "sk-ant-api03-worthless-0123456789");
    let scene = scene.with("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1");
    let done = scene.run_ok(&[&claude, "-p", "say hello"]).await;
    assert_eq!(done.out.trim_end(), HELLO, "{done:?}");
    scene.assert_no_secret("Claude Code's words", &(done.out + &done.err));
    let seen = scene.world.api().seen();
    let asked: Vec<_> = seen.iter().filter(|seen| seen.path.starts_with("/v1/messages")).collect();
    assert!(!asked.is_empty(), "{seen:?}");
    for seen in asked {
        let keys: Vec<_> = seen.headers.get_all("x-api-key").iter().collect();
        assert_eq!(keys, [KEY], "{seen:?}");
        assert!(!seen.headers.contains_key("authorization"), "{seen:?}");
    }
}
