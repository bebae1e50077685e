//! Entry of `mantlet-proxy`; everything is in the library.

#![forbid(unsafe_code)]

/// A request makes some forty small allocations on one thread; the C library's allocator spends three times as long on them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    mantlet_proxy::cli::run(&arguments)
}
