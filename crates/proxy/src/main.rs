//! Entry of `mantlet-proxy`; everything is in the library.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    mantlet_proxy::cli::run(&arguments)
}
