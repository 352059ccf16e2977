//! What a proxy takes when little or nothing is asked of it: memory, CPU, time to start, room on the disk; and what more of
//! everything makes of one request.

use std::time::{Duration, Instant};

use valetkey::sandbox::World;
use valetkey::sandbox::client::{HTTP1, Visit};
use valetkey::tasks::Tasks;

use crate::figures::{Figure, Ratio, Table, median};
use crate::form::Form;
use crate::machine::{self, Cores, Cpu};
use crate::ways::{PLAIN, Proxy, Running, TARGET, UNSEEN, Way};
use crate::works::{self, Load};

/// The names of what is measured here, for `--only`.
pub(crate) const NAMES: [&str; 6] =
    ["memory", "cold", "size", "growth-rules", "growth-leaves", "growth-tunnels"];

/// Memory, CPU of who idles, and starts: for each proxy, `valetkey` the last.
pub(crate) async fn measure(form: &Form, table: &mut Table, proxies: &[&Proxy]) {
    if form.wants("memory") {
        let mut idle = Vec::new();
        for proxy in proxies {
            idle.push(Idle::measure(form, proxy, TARGET).await);
        }
        let column = |of: fn(&Idle) -> f64| idle.iter().map(|idle| Some(of(idle))).collect();
        table.add(&Figure::plain(
            "memory.start",
            "memory, one request served",
            "MB",
            column(|it| it.start),
        ));
        table.add(&Figure::plain(
            "memory.idle",
            "memory, idle connection",
            "KiB",
            column(|it| it.each),
        ));
        table.add(&Figure::plain(
            "memory.cpu",
            "CPU while all of them idle",
            "%",
            column(|it| it.cpu),
        ));
        let mut plain: Vec<Option<f64>> = vec![None; proxies.len() - 1];
        let idle = Idle::measure(form, proxies[proxies.len() - 1], PLAIN).await;
        plain.push(Some(idle.each));
        table.add(&Figure::plain(
            "memory.plain",
            "memory, idle tunnel without a rule",
            "KiB",
            plain,
        ));
    }
    if form.wants("cold") {
        let mut times = Vec::new();
        for proxy in proxies {
            times.push(Some(cold_start(form, proxy).await));
        }
        table.add(&Figure::plain("cold", "start to the first answer", "ms", times));
    }
    if form.wants("size") {
        let size = std::fs::metadata(&form.binary).unwrap().len();
        let mut sizes: Vec<Option<f64>> = vec![None; proxies.len() - 1];
        sizes.push(Some(size as f64 / 1e6));
        table.add(&Figure::plain("size", "the program's file", "MB", sizes));
    }
}

/// A proxy with idle connections.
struct Idle {
    /// Its memory before, in MB.
    start: f64,
    /// What each connection adds, in KiB.
    each: f64,
    /// What part of a core it takes, in percent.
    cpu: f64,
}

impl Idle {
    async fn measure(form: &Form, proxy: &Proxy, target: &'static str) -> Self {
        let running = proxy.start().await;
        let process = running.way.proxy.unwrap();
        let first = works::held(&running.way, TARGET, 1).await;
        let start = machine::memory_of(process);
        let held = works::held(&running.way, target, form.idle).await;
        // What is put off until a connection has idled for a while is waited for, as long as that is not long.
        tokio::time::sleep(form.time * 2).await;
        let (cpu, began) = (Cpu::of(process), Instant::now());
        tokio::time::sleep(form.time * 3).await;
        let cpu = Cpu::of(process).since(&cpu) / began.elapsed().as_secs_f64();
        let grown = machine::memory_of(process) - start;
        drop((first, held));
        running.end().await;
        Self { start: start / 1024.0, each: grown / form.idle as f64, cpu: cpu * 100.0 }
    }
}

/// From the command to the first answer, in milliseconds; the CA is there.
async fn cold_start(form: &Form, proxy: &Proxy) -> f64 {
    let mut times = Vec::new();
    for _ in 0..=form.starts {
        let started = Instant::now();
        let running = proxy.start().await;
        if !running.has_answered {
            let answer = running.way.client.get(Visit::to(TARGET, HTTP1), "/v1/bytes/200").await;
            assert_eq!(answer.unwrap().status(), 200);
        }
        times.push(started.elapsed().as_secs_f64() * 1e3);
        running.end().await;
    }
    // The first start made the CA.
    median(times.split_off(1))
}

/// CPU for a warm request: one rule, one leaf, sixteen connections against many of each.
pub(crate) async fn growth(
    form: &Form,
    table: &mut Table,
    (world, straight): (&World, &Way),
    cores: Option<Cores>,
) {
    if !NAMES.iter().any(|name| name.starts_with("growth") && form.wants(name)) {
        return;
    }
    table.begin("growth, warm HTTP/1.1", &["one", "many"]);
    let start = async |rules, unseen| Proxy::valetkey(world, &form.binary, rules, unseen).on(cores);
    let (small, large) = (start(0, form.grown).await, start(form.grown, 0).await);
    let one = small.start().await;
    let compare = async |many: &Running| {
        let mut pairs = Vec::new();
        for round in 0..=form.rounds {
            let mut pair = [0.0; 2];
            for turn in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
                let way = [&one.way, &many.way][turn].clone();
                let (straight, time) = (straight.clone(), form.time);
                let load = Load { way, straight, time, bulk: 0, unseen: 0..0 };
                let done = works::warm(load, HTTP1, 16, 1).await;
                pair[turn] = done.proxy_cpu / done.units * 1e6;
            }
            pairs.push((pair[0], pair[1]));
        }
        // The first round warms up.
        pairs.split_off(1)
    };
    let mut add = |name: &str, title: String, pairs: Vec<(f64, f64)>| {
        let of = |pick: fn(&(f64, f64)) -> f64| Some(median(pairs.iter().map(pick).collect()));
        let values = vec![of(|pair| pair.0), of(|pair| pair.1)];
        let ratio = Ratio::of(&pairs);
        table.add(&Figure { ratio, ..Figure::plain(name, &title, "CPU us/req", values) });
    };
    if form.wants("growth-rules") {
        let many = large.start().await;
        add("growth-rules", format!("{} rules", form.grown), compare(&many).await);
        many.end().await;
    }
    if form.wants("growth-leaves") {
        let many = small.start().await;
        greet_all(&many.way, form.grown).await;
        add("growth-leaves", format!("{} leaves made", form.grown), compare(&many).await);
        many.end().await;
    }
    if form.wants("growth-tunnels") {
        let many = small.start().await;
        // The client's end of each, and as much again that the proxy keeps free for its upstreams.
        let room = usize::try_from(machine::raise_descriptors() / 2).unwrap();
        let count = form.open.min(room.saturating_sub(500)).max(1);
        let held = works::held(&many.way, TARGET, count).await;
        add("growth-tunnels", format!("{count} tunnels open"), compare(&many).await);
        drop(held);
        many.end().await;
    }
    one.end().await;
}

/// Shakes hands with each of so many hosts below [`UNSEEN`], sixteen at a time.
async fn greet_all(way: &Way, count: usize) {
    let tasks = Tasks::new();
    let mut running = Vec::new();
    for worker in 0..16 {
        let client = way.client.clone();
        running.push(tasks.spawn(async move {
            for number in (worker..count).step_by(16) {
                let target = format!("h{number}.{UNSEEN}:443");
                client.greet(Visit::to(&target, HTTP1)).await.unwrap();
            }
        }));
    }
    for worker in running {
        tokio::time::timeout(GREETING, worker).await.expect("the handshakes end").unwrap();
    }
}

/// Ten thousand handshakes, in a build without optimisation, on a busy machine.
const GREETING: Duration = Duration::from_secs(300);
