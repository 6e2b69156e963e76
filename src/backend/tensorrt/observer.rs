//! Progress of a build, and its cancellation.

use std::ops::ControlFlow;

/// One report of a running build.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct BuildProgress<'a> {
    /// TensorRT's name of the current phase, such as `Optimizing graph`.
    pub phase: &'a str,
    /// Share of TensorRT's completed steps, 0 to 1; never decreases. Steps differ greatly in length.
    pub fraction: f32,
}

/// Called with a build's progress, on any thread; may stop the build.
pub trait BuildObserver: Send + Sync {
    /// `Break` cancels: [`build`](super::build) then returns [`EngineBuildError::Cancelled`](super::EngineBuildError::Cancelled) soon after.
    fn progress(&self, progress: BuildProgress<'_>) -> ControlFlow<()>;
}

impl<F: Fn(BuildProgress<'_>) -> ControlFlow<()> + Send + Sync> BuildObserver for F {
    fn progress(&self, progress: BuildProgress<'_>) -> ControlFlow<()> {
        self(progress)
    }
}

#[cfg(feature = "engines")]
pub(super) use adapter::Monitor;

#[cfg(feature = "engines")]
mod adapter {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::{Arc, Mutex};

    use super::*;

    struct Phase {
        name: String,
        steps: u32,
        done: u32,
    }

    #[derive(Default)]
    struct State {
        open: Vec<Phase>,
        fraction: f32,
        cancelled: bool,
        panic: Option<Box<dyn std::any::Any + Send>>,
    }

    /// Turns TensorRT's nested phases into one fraction, and keeps panics of the observer out of C++ frames.
    #[derive(Clone)]
    pub(in super::super) struct Monitor {
        observer: Arc<dyn BuildObserver>,
        state: Arc<Mutex<State>>,
    }

    impl Monitor {
        pub(in super::super) fn new(observer: Arc<dyn BuildObserver>) -> Self {
            Monitor {
                observer,
                state: Arc::default(),
            }
        }

        /// Whether the observer stopped the build; resumes a panic of the observer.
        pub(in super::super) fn cancelled(&self) -> bool {
            let mut state = self.lock();
            if let Some(panic) = state.panic.take() {
                drop(state);
                std::panic::resume_unwind(panic);
            }
            state.cancelled
        }

        fn lock(&self) -> std::sync::MutexGuard<'_, State> {
            self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
        }

        fn report(&self, phase: &str) -> ControlFlow<()> {
            let fraction = {
                let mut state = self.lock();
                if state.cancelled {
                    return ControlFlow::Break(());
                }
                // The innermost phase is a part of one step of the enclosing phase.
                let fraction = state.open.iter().rev().fold(0.0, |inner, phase| {
                    let steps = phase.steps.max(1) as f32;
                    ((phase.done as f32 + inner) / steps).min(1.0)
                });
                state.fraction = state.fraction.max(fraction);
                state.fraction
            };
            let verdict = catch_unwind(AssertUnwindSafe(|| {
                self.observer.progress(BuildProgress { phase, fraction })
            }));
            let verdict = verdict.unwrap_or_else(|panic| {
                self.lock().panic = Some(panic);
                ControlFlow::Break(())
            });
            if verdict.is_break() {
                self.lock().cancelled = true;
            }
            verdict
        }
    }

    impl trtx::interfaces::MonitorProgress for Monitor {
        // trtx passes the phase's own name as its parent, so nesting is derived from the order of events.
        fn phase_start(&self, phase_name: &str, _parent: Option<&str>, num_steps: i32) {
            self.lock().open.push(Phase {
                name: phase_name.to_string(),
                steps: num_steps.max(0) as u32,
                done: 0,
            });
            // A phase cannot refuse to start; the next step returns the Break.
            let _ = self.report(phase_name);
        }

        fn step_complete(&self, phase_name: &str, step: i32) -> ControlFlow<()> {
            {
                let mut state = self.lock();
                if let Some(phase) = state.open.iter_mut().rev().find(|p| p.name == phase_name) {
                    phase.done = phase.done.max((step.max(0) + 1) as u32);
                }
            }
            self.report(phase_name)
        }

        fn phase_finish(&self, phase_name: &str) {
            let mut state = self.lock();
            if let Some(at) = state.open.iter().rposition(|p| p.name == phase_name) {
                state.open.remove(at);
            }
            if state.open.is_empty() && !state.cancelled {
                state.fraction = 1.0;
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use trtx::interfaces::MonitorProgress;

        use super::*;

        #[test]
        fn nested_phases_make_one_rising_fraction_and_a_panic_cancels() {
            let seen = Arc::new(Mutex::new(Vec::new()));
            let record = seen.clone();
            let monitor = Monitor::new(Arc::new(move |p: BuildProgress<'_>| {
                record.lock().unwrap().push(p.fraction);
                assert!(p.fraction < 0.9, "stop here");
                ControlFlow::Continue(())
            }));
            monitor.phase_start("outer", None, 2);
            monitor.phase_start("inner", None, 4);
            for step in 0..4 {
                assert!(monitor.step_complete("inner", step).is_continue());
            }
            monitor.phase_finish("inner");
            assert!(monitor.step_complete("outer", 0).is_continue());
            assert_eq!(*seen.lock().unwrap(), [0.0, 0.0, 0.125, 0.25, 0.375, 0.5, 0.5]);
            assert!(monitor.step_complete("outer", 1).is_break());
            assert!(
                catch_unwind(AssertUnwindSafe(|| monitor.cancelled())).is_err(),
                "the panic surfaces"
            );
            assert!(monitor.cancelled());
        }
    }
}
