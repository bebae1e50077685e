//! Entry of `mantlet-proxy`; everything is in the library.

#![forbid(unsafe_code)]

use mantlet_net::memory::Wiping;

/// A request makes some forty small allocations on one thread; the C library's allocator spends three times as long on them.
/// The threads of the agent, where keys arrive, wipe what they free.
#[global_allocator]
static ALLOCATOR: Wiping<mimalloc::MiMalloc> = Wiping::where_asked(mimalloc::MiMalloc);

fn main() -> std::process::ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    mantlet_proxy::cli::run(&arguments)
}
