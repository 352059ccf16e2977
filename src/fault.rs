//! Ends, stops or breaks the process at a named step, for proofs: in builds with debug assertions alone.

/// The variable that names steps and what happens there: see [`arm`].
pub const VARIABLE: &str = "VALETKEY_FAULT";

/// Arms the steps that `spec` names: `STEP=ACT`, several with commas between them. `kill` is SIGKILL, `stop` SIGSTOP,
/// `panic` a panic, `panic-once` one the first time alone. A release has no steps, and ignores this.
///
/// # Errors
///
/// What of it makes no sense.
pub fn arm(spec: &str) -> Result<(), String> {
    #[cfg(debug_assertions)]
    return armed::arm(spec);
    #[cfg(not(debug_assertions))]
    {
        let _no_steps = spec;
        Ok(())
    }
}

/// A step at which a proof may strike. Nothing at all in a release.
#[inline]
pub fn point(step: &str) {
    #[cfg(debug_assertions)]
    armed::strike(step);
    #[cfg(not(debug_assertions))]
    let _no_step = step;
}

#[cfg(debug_assertions)]
mod armed {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};

    use rustix::process::{Signal, getpid, kill_process};

    enum Act {
        Signal(Signal),
        Panic,
        /// Whether it has.
        PanicOnce(AtomicBool),
    }

    static ARMED: OnceLock<Vec<(String, Act)>> = OnceLock::new();

    pub(super) fn arm(spec: &str) -> Result<(), String> {
        let steps = spec.split(',').map(|step| {
            let (name, act) = step.split_once('=').unwrap_or((step, ""));
            let act = match act {
                "kill" => Act::Signal(Signal::KILL),
                "stop" => Act::Signal(Signal::STOP),
                "panic" => Act::Panic,
                "panic-once" => Act::PanicOnce(AtomicBool::new(false)),
                _ => return Err(format!("`{step}` is no STEP=kill, STEP=stop or STEP=panic")),
            };
            Ok((name.to_owned(), act))
        });
        ARMED.set(steps.collect::<Result<_, _>>()?).map_err(|_| "armed twice".to_owned())
    }

    #[expect(clippy::panic, reason = "a proof has asked for it")]
    pub(super) fn strike(step: &str) {
        let armed = ARMED.get().map(Vec::as_slice).unwrap_or_default();
        match armed.iter().find(|(name, _)| name == step) {
            None => {}
            Some((_, Act::Panic)) => panic!("as a proof has asked at {step}"),
            Some((_, Act::PanicOnce(has))) if has.swap(true, Ordering::Relaxed) => {}
            Some((_, Act::PanicOnce(_))) => panic!("as a proof has asked at {step}"),
            Some((_, Act::Signal(signal))) => {
                tracing::warn!(step, ?signal, "as a proof has asked");
                // It can only fail for a signal that there is not.
                let _sent = kill_process(getpid(), *signal);
            }
        }
    }
}
