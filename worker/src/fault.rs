//! Faults on demand, to test what becomes of the other ranks: `TUNEFLEET_FAULT` in the environment of
//! a debug build, e.g. `rank=1,step=3,phase=reduce,do=kill`, with `attempt=1` in that attempt alone. Other builds
//! do not know it.

/// Where in a rank's work a fault may strike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Before the rank meets its peers; the step is 0.
    Start,
    /// Before a block is gathered.
    Gather,
    /// Before a block's gradients are computed.
    Backward,
    /// Before a block's gradients are reduced.
    Reduce,
    /// Before the optimizer's update.
    Update,
    /// Before the rank writes its part of a checkpoint.
    Save,
}

/// The attempt that this process belongs to.
pub fn attempt(attempt: u32) {
    #[cfg(debug_assertions)]
    armed::attempt(attempt);
    #[cfg(not(debug_assertions))]
    let _ = attempt;
}

/// This thread is about to do `step` of `rank`.
pub fn at(rank: u32, step: u64) {
    #[cfg(debug_assertions)]
    armed::at(rank, step);
    #[cfg(not(debug_assertions))]
    let _ = (rank, step);
}

/// Strikes if the fault is meant for this rank, step and phase; once.
pub fn point(phase: Phase) {
    #[cfg(debug_assertions)]
    armed::point(phase);
    #[cfg(not(debug_assertions))]
    let _ = phase;
}

#[cfg(debug_assertions)]
mod armed {
    use std::cell::Cell;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use std::time::Duration;

    use nix::sys::signal::{Signal, raise};

    use super::Phase;

    const VARIABLE: &str = "TUNEFLEET_FAULT";
    const PHASES: [(&str, Phase); 6] = [
        ("start", Phase::Start),
        ("gather", Phase::Gather),
        ("backward", Phase::Backward),
        ("reduce", Phase::Reduce),
        ("update", Phase::Update),
        ("save", Phase::Save),
    ];
    const ACTIONS: [(&str, Action); 12] = [
        ("kill", Action::Kill),
        ("exit", Action::Exit),
        ("stop", Action::Stop),
        ("oom", Action::Oom),
        ("stall", Action::Stall),
        ("segv", Action::Signal(Signal::SIGSEGV)),
        ("abort", Action::Signal(Signal::SIGABRT)),
        ("term", Action::Signal(Signal::SIGTERM)),
        ("panic", Action::Panic),
        ("loop", Action::Loop),
        ("slow", Action::Slow),
        ("leak", Action::Leak),
    ];
    /// How late [`Action::Slow`] makes each point.
    const SLOW: Duration = Duration::from_millis(30);
    /// Exit code of [`Action::Exit`].
    const EXIT_CODE: i32 = 3;

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(super) enum Action {
        /// SIGKILL.
        Kill,
        /// Ends the process with a code of its own.
        Exit,
        /// SIGSTOP: no thread of the process runs any more.
        Stop,
        /// Asks libtorch for more memory than there is.
        Oom,
        /// This thread sleeps for ever; the others go on.
        Stall,
        /// Gets this signal.
        Signal(Signal),
        /// Fails as a bug would.
        Panic,
        /// This thread computes for ever.
        Loop,
        /// Each point from there on takes longer.
        Slow,
        /// Takes memory until the kernel minds.
        Leak,
    }

    #[derive(Debug, PartialEq, Eq)]
    pub(super) struct Fault {
        rank: u32,
        step: u64,
        phase: Phase,
        action: Action,
        attempt: Option<u32>,
    }

    impl Fault {
        pub(super) fn parse(text: &str) -> Result<Self, String> {
            let [mut rank, mut step, mut phase, mut action, mut attempt] = [None; 5];
            for part in text.split(',') {
                let (key, value) =
                    part.split_once('=').ok_or_else(|| format!("{part:?} is not KEY=VALUE"))?;
                match key {
                    "rank" => rank = Some(value),
                    "step" => step = Some(value),
                    "phase" => phase = Some(value),
                    "do" => action = Some(value),
                    "attempt" => attempt = Some(value),
                    _ => {
                        return Err(format!(
                            "unknown key {key:?}; there are rank, step, phase, do and attempt"
                        ));
                    }
                }
            }
            let number = |key: &str, value: Option<&str>| -> Result<u64, String> {
                let value = value.ok_or_else(|| format!("{key} is missing"))?;
                value.parse().map_err(|error| format!("{key}={value}: {error}"))
            };
            Ok(Fault {
                rank: u32::try_from(number("rank", rank)?).map_err(|error| format!("rank: {error}"))?,
                step: number("step", step)?,
                phase: named("phase", phase, &PHASES)?,
                action: named("do", action, &ACTIONS)?,
                attempt: match attempt {
                    Some(_) => {
                        Some(u32::try_from(number("attempt", attempt)?).map_err(|error| error.to_string())?)
                    }
                    None => None,
                },
            })
        }
    }

    fn named<T: Copy>(key: &str, value: Option<&str>, known: &[(&str, T)]) -> Result<T, String> {
        let found = known.iter().find(|(name, _)| Some(*name) == value);
        found.map(|(_, named)| *named).ok_or_else(|| {
            let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
            format!("{key} must be one of {}, got {:?}", names.join(", "), value.unwrap_or_default())
        })
    }

    thread_local! {
        static HERE: Cell<(u32, u64)> = const { Cell::new((0, 0)) };
    }

    static ATTEMPT: AtomicU32 = AtomicU32::new(0);
    static IS_SLOW: AtomicBool = AtomicBool::new(false);

    pub(super) fn attempt(attempt: u32) {
        ATTEMPT.store(attempt, Ordering::Release);
    }

    pub(super) fn at(rank: u32, step: u64) {
        HERE.set((rank, step));
    }

    pub(super) fn point(phase: Phase) {
        static FAULT: OnceLock<Option<Fault>> = OnceLock::new();
        static STRUCK: AtomicBool = AtomicBool::new(false);
        let asked = FAULT.get_or_init(|| {
            let text = std::env::var(VARIABLE).ok()?;
            // A slip of the pen must not make a test of faults pass.
            Some(Fault::parse(&text).unwrap_or_else(|error| panic!("{VARIABLE}={text}: {error}")))
        });
        let Some(fault) = asked else { return };
        if IS_SLOW.load(Ordering::Acquire) {
            std::thread::sleep(SLOW);
        }
        let now = fault.attempt.is_none_or(|attempt| attempt == ATTEMPT.load(Ordering::Acquire));
        let here = now && (fault.rank, fault.step) == HERE.get() && fault.phase == phase;
        if here && !STRUCK.swap(true, Ordering::AcqRel) {
            tracing::warn!("{VARIABLE} strikes: {fault:?}");
            strike(fault.action);
        }
    }

    fn strike(action: Action) {
        match action {
            Action::Kill => {
                let _ = raise(Signal::SIGKILL);
            }
            Action::Exit => std::process::exit(EXIT_CODE),
            Action::Stop => {
                let _ = raise(Signal::SIGSTOP);
            }
            Action::Oom => drop(tch::Tensor::zeros([1 << 50], (tch::Kind::Float, tch::Device::Cpu))),
            Action::Stall => loop {
                std::thread::park();
            },
            Action::Signal(Signal::SIGSEGV) => {
                // The first may only take away the handler that looks for stack overflows.
                let _ = raise(Signal::SIGSEGV);
                let _ = raise(Signal::SIGSEGV);
            }
            Action::Signal(signal) => {
                let _ = raise(signal);
            }
            Action::Panic => panic!("a fault that was asked for"),
            Action::Loop => loop {
                std::hint::spin_loop();
            },
            Action::Slow => IS_SLOW.store(true, Ordering::Release),
            Action::Leak => {
                let mut all: Vec<Vec<u8>> = Vec::new();
                loop {
                    // Written to, or it would only be promised.
                    all.push(vec![1; 16 << 20]);
                }
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_fault_is_read_in_any_order_of_its_keys() {
            let fault = Fault { rank: 1, step: 3, phase: Phase::Reduce, action: Action::Kill, attempt: None };
            assert_eq!(Fault::parse("rank=1,step=3,phase=reduce,do=kill"), Ok(fault));
            let fault =
                Fault { rank: 0, step: 0, phase: Phase::Start, action: Action::Stall, attempt: Some(2) };
            assert_eq!(Fault::parse("do=stall,phase=start,attempt=2,step=0,rank=0"), Ok(fault));
        }

        #[test]
        fn what_is_not_a_fault_is_refused_by_name() {
            for (text, said) in [
                ("", "not KEY=VALUE"),
                ("rank=1,step=3,phase=reduce", "do must be one of kill, exit, stop, oom, stall, segv"),
                ("rank=1,step=3,phase=forward,do=kill", "phase must be one of start, gather"),
                ("rank=-1,step=3,phase=reduce,do=kill", "rank=-1"),
                ("rank=1,phase=reduce,do=kill", "step is missing"),
                ("rank=1,step=3,phase=reduce,do=kill,when=now", "unknown key \"when\""),
            ] {
                let error = Fault::parse(text).unwrap_err();
                assert!(error.contains(said), "{text:?}: {error}");
            }
        }
    }
}
