//! Calls into the `tokenizers` library, which panics on some damaged files: its panics become errors of the file or
//! text.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The library's result, or its panic as an error. Do not use anything that `call` changed after a panic.
pub(super) fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| Err(said(&*panic).into()))
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("the library failed: {}", text.unwrap_or("it does not say why"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error() {
        assert_eq!(guarded(|| Ok(1)).unwrap(), 1);
        let number = 7;
        let error = guarded::<()>(|| panic!("number {number}")).unwrap_err();
        assert_eq!(error.to_string(), "the library failed: number 7");
        assert!(
            guarded::<()>(|| panic!("plain"))
                .unwrap_err()
                .to_string()
                .contains("plain")
        );
    }
}
