//! The workloads of the labs: `mantlet-samples customers` and `mantlet-samples web-frontend`.
//!
//! Started by the node agent as the containers of the labs' Deployments. They know nothing of the mesh: plain HTTP in,
//! plain HTTP out, environment variables for settings, SIGTERM for an orderly end.

mod customers;
mod server;
mod web_frontend;

use std::net::{Ipv4Addr, SocketAddr};

use clap::Parser;

#[derive(Debug, Parser)]
#[command(name = "mantlet-samples", about = "Sample workloads of Mantlet's labs")]
enum Cli {
    /// A JSON list of customers
    Customers {
        /// Port to listen on
        #[arg(long, env = "PORT", default_value_t = 3000)]
        port: u16,
    },
    /// A page that shows the customers
    WebFrontend {
        /// Port to listen on
        #[arg(long, env = "PORT", default_value_t = 8080)]
        port: u16,
        /// Where the list of customers is
        #[arg(long, env = "CUSTOMER_SERVICE_URL", default_value = "http://customers")]
        customers_url: String,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let on = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    match Cli::parse() {
        Cli::Customers { port } => server::run(on(port), customers::answer).await,
        Cli::WebFrontend { port, customers_url } => {
            let frontend = web_frontend::Frontend::new(&customers_url)?;
            server::run(on(port), move |request| {
                let frontend = frontend.clone();
                async move { frontend.answer(request).await }
            })
            .await
        }
    }
}
