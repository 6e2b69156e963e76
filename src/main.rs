fn main() -> std::process::ExitCode {
    lapidary::cli::main()
}
