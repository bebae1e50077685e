//! Group I, as far as it is about who is let in before a policy is asked. The meaning of policies is attacked in
//! `crates/differential/tests/differential/threats.rs`, where objects become configuration.

use mantlet_model::authz::{Attribute, Expr, Matcher};
use mantlet_testkit::EchoServer;

use super::common::{Mesh, Mode, Port, allow, curl};

/// ISTIO-SECURITY-2021-004: an ALLOW by a negated name holds for whoever has none. On a STRICT port nobody without a name gets
/// as far as the policy; on a PERMISSIVE one, which is the attack without its defence, the same policy lets plaintext in.
#[tokio::test]
async fn reg_132_strict_ports_see_no_plaintext() {
    let app = EchoServer::start().await;
    for (mode, status) in [(Mode::Strict, 0), (Mode::Permissive, 200)] {
        let mut mesh = Mesh::new(app.address(), Port::Http, mode).await;
        let evil = Matcher::Exact("spiffe://cluster.local/ns/a/sa/evil".into());
        mesh.inbound.authz = allow(Expr::atom(Attribute::PeerUri, evil).not());
        mesh.apply().await;
        let plain = curl(&[&format!("http://{}/", mesh.inbound.listen)]).await;
        assert_eq!(plain.status, status, "{mode:?}: {}", plain.body);
        assert_eq!(app.take().len(), usize::from(status == 200), "{mode:?}");
        let url = format!("http://{}/", mesh.entry());
        let named = curl(&["-H", &format!("host: {}", super::common::HOST), &url]).await;
        assert_eq!(named.status, 200, "{mode:?}: a name that is not the excluded one");
        app.take();
    }
}
