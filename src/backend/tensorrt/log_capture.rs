//! TensorRT's log, stored for error messages instead of printed.

use std::sync::{Arc, Mutex};

use trtx::{LogHandler, Severity};

#[derive(Default)]
struct Messages {
    errors: Vec<String>,
    warnings: Vec<String>,
}

/// A log handler whose clones share their messages.
#[derive(Clone, Default)]
pub(super) struct LogCapture(Arc<Mutex<Messages>>);

impl LogHandler for LogCapture {
    fn log(&self, severity: Severity, message: &str) {
        let mut messages = self.lock();
        match severity {
            Severity::InternalError | Severity::Error => messages.errors.push(message.trim().to_string()),
            Severity::Warning => messages.warnings.push(message.trim().to_string()),
            Severity::Info | Severity::Verbose => {}
        }
    }
}

impl LogCapture {
    fn lock(&self) -> std::sync::MutexGuard<'_, Messages> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The errors since the last call, in TensorRT's words, without duplicates and consequences of others.
    pub(super) fn take_errors(&self) -> Option<String> {
        let mut errors = std::mem::take(&mut self.lock().errors);
        let consequence = |message: &str| message.contains("Output shape can not be computed for node");
        // Every builder on a machine without a driver starts by logging CUDA error 35, which is unrelated to the
        // network.
        let no_driver = |message: &str| message.contains("cudaError 35");
        for of_no_use in [&no_driver as &dyn Fn(&str) -> bool, &consequence] {
            if errors.iter().any(|message| !of_no_use(message)) {
                errors.retain(|message| !of_no_use(message));
            }
        }
        let mut unique: Vec<String> = Vec::new();
        for message in errors {
            if !unique.contains(&message) {
                unique.push(message);
            }
        }
        (!unique.is_empty()).then(|| unique.join("\n"))
    }

    pub(super) fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().warnings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_is_kept_and_its_echoes_dropped() {
        let capture = LogCapture::default();
        let cause = "ITensor::getDimensions: volume mismatch";
        capture.log(
            Severity::Error,
            "Cuda Runtime (cudaError 35: CUDA driver version is insufficient)",
        );
        capture.log(Severity::Error, cause);
        capture.log(Severity::Error, "Output shape can not be computed for node x");
        capture.log(Severity::Error, cause);
        assert_eq!(capture.take_errors().as_deref(), Some(cause));
        assert_eq!(capture.take_errors(), None);
        capture.log(Severity::Error, "Output shape can not be computed for node x");
        assert!(capture.take_errors().is_some(), "better than nothing");
    }
}
