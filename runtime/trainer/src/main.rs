fn main() -> std::process::ExitCode {
    vicuna_trainer::cli::main()
}
