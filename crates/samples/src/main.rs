//! The workloads of the labs, one subcommand each (`mantlet-samples customers`).
//!
//! Started by the node agent as the containers of the labs' Deployments. They know nothing of the mesh: plain HTTP in,
//! plain HTTP out, environment variables for settings, SIGTERM for an orderly end.

mod analyzer;
mod catalog;
mod customers;
mod ext_authz;
mod guestbook;
mod redis;
mod server;
mod upload;
mod web_frontend;

use std::net::{Ipv4Addr, SocketAddr};

use clap::Parser;

#[derive(Debug, Parser)]
#[command(name = "mantlet-samples", about = "Sample workloads of Mantlet's labs")]
enum Cli {
    /// A shop's catalog and its prices
    Catalog {
        /// Port to listen on
        #[arg(long, env = "PORT", default_value_t = 3000)]
        port: u16,
    },
    /// A JSON list of customers
    Customers {
        /// Port to listen on
        #[arg(long, env = "PORT", default_value_t = 3000)]
        port: u16,
    },
    /// An external authorizer that admits `x-ext-authz: allow`
    ExtAuthz {
        /// Port for checks over HTTP
        #[arg(long, env = "PORT", default_value_t = 8000)]
        port: u16,
        /// Port for checks over gRPC
        #[arg(long, env = "GRPC_PORT", default_value_t = 9000)]
        grpc_port: u16,
    },
    /// A page that visitors write to
    Guestbook {
        /// Port to listen on
        #[arg(long, env = "PORT", default_value_t = 3000)]
        port: u16,
        /// Redis, as host:port
        #[arg(long, env = "REDIS_ADDRESS", default_value = "redis-master:6379")]
        redis: String,
        /// Where tones are analysed; without it this is version 1
        #[arg(long, env = "ANALYZER_URL")]
        analyzer_url: Option<String>,
    },
    /// Tones of texts
    Analyzer {
        /// Port to listen on
        #[arg(long, env = "PORT", default_value_t = 5000)]
        port: u16,
    },
    /// Keeps uploaded files
    Upload {
        /// Port to listen on
        #[arg(long, env = "PORT", default_value_t = 8080)]
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
        Cli::Catalog { port } => server::run(on(port), catalog::answer).await,
        Cli::Customers { port } => server::run(on(port), customers::answer).await,
        Cli::ExtAuthz { port, grpc_port } => ext_authz::run(on(port), on(grpc_port)).await,
        Cli::Analyzer { port } => server::run(on(port), analyzer::answer).await,
        Cli::Guestbook {
            port,
            redis,
            analyzer_url,
        } => {
            let guestbook = guestbook::Guestbook::new(&redis, analyzer_url.as_deref())?;
            server::run(on(port), move |request| {
                let guestbook = guestbook.clone();
                async move { guestbook.answer(request).await }
            })
            .await
        }
        Cli::Upload { port } => {
            let upload = upload::Upload::default();
            server::run(on(port), move |request| {
                let upload = upload.clone();
                async move { upload.answer(request).await }
            })
            .await
        }
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
