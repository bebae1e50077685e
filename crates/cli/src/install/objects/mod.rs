//! The objects of an installation, by component and in the order they are applied. Pure: a resolved spec in, JSON out.

mod gateway;
mod istiod;
mod rbac;

use anyhow::Result;
use mantlet_api::crd;
use serde_json::{Value, json};

use super::spec::Spec;

/// A part of the installation that is applied, waited for and named as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Component {
    /// CRDs, namespace, cluster-wide roles.
    Base,
    /// The control plane.
    Pilot,
    /// Gateways out of the mesh.
    EgressGateways,
    /// Gateways into the mesh.
    IngressGateways,
}

impl Component {
    /// Name in labels and on the command line.
    pub(super) fn id(self) -> &'static str {
        match self {
            Component::Base => "Base",
            Component::Pilot => "Pilot",
            Component::EgressGateways => "EgressGateways",
            Component::IngressGateways => "IngressGateways",
        }
    }

    /// Name in progress lines.
    pub(super) fn title(self) -> &'static str {
        match self {
            Component::Base => "Istio core",
            Component::Pilot => "Istiod",
            Component::EgressGateways => "Egress gateways",
            Component::IngressGateways => "Ingress gateways",
        }
    }
}

/// The objects of a component.
#[derive(Debug, Clone)]
pub(super) struct Group {
    /// Which.
    pub(super) component: Component,
    /// In order.
    pub(super) objects: Vec<Value>,
}

/// All objects of an installation.
pub(super) fn all(spec: &Spec) -> Result<Vec<Group>> {
    let mut groups = Vec::new();
    if spec.base {
        groups.push(Group {
            component: Component::Base,
            objects: base(spec),
        });
    }
    if spec.pilot {
        groups.push(Group {
            component: Component::Pilot,
            objects: istiod::objects(spec)?,
        });
    }
    for (component, ingress) in [(Component::EgressGateways, false), (Component::IngressGateways, true)] {
        let mut objects = Vec::new();
        for gateway in spec.gateways.iter().filter(|g| g.ingress == ingress) {
            objects.extend(gateway::objects(spec, gateway)?);
        }
        if !objects.is_empty() {
            groups.push(Group { component, objects });
        }
    }
    for group in &mut groups {
        for object in &mut group.objects {
            label(spec, group.component, object);
        }
    }
    Ok(groups)
}

/// Labels by which the installer finds its objects again.
fn label(spec: &Spec, component: Component, object: &mut Value) {
    // The namespace is shared with the user, so it is never found, and never removed, by label.
    if object["kind"] == "Namespace" {
        return;
    }
    let labels = &mut object["metadata"]["labels"];
    if !labels.is_object() {
        *labels = json!({});
    }
    labels["install.operator.istio.io/owning-resource"] = json!("unknown");
    labels["install.operator.istio.io/owning-resource-namespace"] = json!(spec.namespace);
    labels["operator.istio.io/component"] = json!(component.id());
    labels["operator.istio.io/managed"] = json!("Reconcile");
    labels["operator.istio.io/version"] = json!(spec.version());
    // What all revisions share belongs to none of them.
    if component != Component::Base {
        labels["istio.io/rev"] = json!(spec.revision_label());
    }
    labels["release"] = json!("istio");
}

fn base(spec: &Spec) -> Vec<Value> {
    let mut objects = crd::all();
    objects.push(json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": spec.namespace } }));
    objects.extend(rbac::base(spec));
    objects
}
