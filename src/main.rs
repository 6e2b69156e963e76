//! The command line: a thin shell over the library.

fn main() -> std::process::ExitCode {
    // SAFETY: the first statement of the program, so there is no other thread.
    unsafe { lapidary::backend::tensorrt::compute_in_full_precision() };
    lapidary::cli::main()
}
