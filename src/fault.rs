//! Ends, stops or breaks the process at a named step, for proofs: in builds with debug assertions alone.

/// The variable that names steps and what happens there: see [`arm`].
pub const VARIABLE: &str = "VALETKEY_FAULT";

/// Arms the steps that `spec` names: `STEP=ACT`, several with commas between them. `kill` is SIGKILL, `stop` SIGSTOP,
/// `panic` a panic, `say` a line in the log. `STEP#3=ACT` strikes when the step is come to for the third time, and
/// then alone. A release has no steps, and ignores this.
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
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use rustix::process::{Signal, getpid, kill_process};

    #[derive(Clone, Copy)]
    enum Act {
        Signal(Signal),
        Panic,
        Say,
    }

    struct Armed {
        step: String,
        /// Which time it strikes; `None` each time.
        at: Option<usize>,
        act: Act,
        /// How often the step was come to.
        times: AtomicUsize,
    }

    /// How long it may take until every thread stands still, on a busy machine too.
    const STOPPED_BY_NOW: Duration = Duration::from_millis(500);

    static ARMED: OnceLock<Vec<Armed>> = OnceLock::new();

    pub(super) fn arm(spec: &str) -> Result<(), String> {
        let armed = spec.split(',').map(|one| {
            parse(one).ok_or_else(|| {
                format!("`{one}` is no STEP=kill, STEP=stop, STEP=panic or STEP=say")
            })
        });
        ARMED.set(armed.collect::<Result<_, _>>()?).map_err(|_| "armed twice".to_owned())
    }

    fn parse(one: &str) -> Option<Armed> {
        let (step, act) = one.split_once('=')?;
        let act = match act {
            "kill" => Act::Signal(Signal::KILL),
            "stop" => Act::Signal(Signal::STOP),
            "panic" => Act::Panic,
            "say" => Act::Say,
            _ => return None,
        };
        let (step, at) = match step.split_once('#') {
            None => (step, None),
            Some((step, at)) => (step, Some(at.parse().ok()?)),
        };
        Some(Armed { step: step.to_owned(), at, act, times: AtomicUsize::new(0) })
    }

    pub(super) fn strike(step: &str) {
        let armed = ARMED.get().map(Vec::as_slice).unwrap_or_default();
        for one in armed.iter().filter(|one| one.step == step) {
            let time = one.times.fetch_add(1, Ordering::Relaxed) + 1;
            if one.at.is_none_or(|at| at == time) {
                perform(step, one.act);
            }
        }
    }

    #[expect(clippy::panic, reason = "a proof has asked for it")]
    fn perform(step: &str, act: Act) {
        match act {
            Act::Panic => panic!("as a proof has asked at {step}"),
            Act::Say => tracing::warn!(step, "come to"),
            Act::Signal(signal) => {
                tracing::warn!(step, ?signal, "as a proof has asked");
                // It can only fail for a signal that there is not.
                let _sent = kill_process(getpid(), signal);
                // Any thread may be the one that takes it and stops the others: this one must not go on meanwhile.
                if signal == Signal::STOP {
                    std::thread::sleep(STOPPED_BY_NOW);
                }
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn steps_and_acts() {
            let table = [
                ("a=kill", Some(("a", None))),
                ("a#3=stop", Some(("a", Some(3)))),
                ("a-b=panic", Some(("a-b", None))),
                ("a#1=say", Some(("a", Some(1)))),
                ("a", None),
                ("a=bang", None),
                ("a#=kill", None),
                ("a#x=kill", None),
            ];
            for (spec, expected) in table {
                let armed = parse(spec);
                let found = armed.as_ref().map(|armed| (armed.step.as_str(), armed.at));
                assert_eq!(found, expected, "{spec}");
            }
        }
    }
}
