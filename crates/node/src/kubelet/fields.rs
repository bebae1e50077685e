//! Values that a pod's specification refers to: fields of the pod, resources of a container, quantities.
//!
//! Used for environment variables and downward-API volumes. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceFieldSelector};

/// What is known about the pod beyond its object.
#[derive(Clone, Debug)]
pub(crate) struct PodFacts {
    pub(crate) pod_ip: String,
    pub(crate) host_ip: String,
    pub(crate) cpus: u64,
    pub(crate) memory: u64,
}

/// The value of a `fieldRef`.
pub(crate) fn field(pod: &Pod, facts: &PodFacts, path: &str) -> Result<String, String> {
    let meta = &pod.metadata;
    let spec = pod.spec.as_ref();
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    Ok(match path {
        "metadata.name" => text(&meta.name),
        "metadata.namespace" => text(&meta.namespace),
        "metadata.uid" => text(&meta.uid),
        "metadata.labels" => lines(meta.labels.as_ref()),
        "metadata.annotations" => lines(meta.annotations.as_ref()),
        "spec.nodeName" => spec.map(|s| text(&s.node_name)).unwrap_or_default(),
        "spec.serviceAccountName" => spec
            .and_then(|s| s.service_account_name.clone())
            .unwrap_or_else(|| "default".into()),
        "status.hostIP" | "status.hostIPs" => facts.host_ip.clone(),
        "status.podIP" | "status.podIPs" => facts.pod_ip.clone(),
        _ => {
            let keyed = path.strip_suffix("']").and_then(|p| p.split_once("['"));
            let map = match keyed {
                Some(("metadata.labels", _)) => meta.labels.as_ref(),
                Some(("metadata.annotations", _)) => meta.annotations.as_ref(),
                _ => return Err(format!("unsupported fieldPath: {path}")),
            };
            let key = keyed.map(|(_, key)| key).unwrap_or_default();
            map.and_then(|map| map.get(key)).cloned().unwrap_or_default()
        }
    })
}

/// `key="value"` lines, as the downward API writes maps.
fn lines(map: Option<&BTreeMap<String, String>>) -> String {
    map.into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={value:?}"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// The value of a `resourceFieldRef`. Without a limit it is what the node has.
pub(crate) fn resource(
    pod: &Pod,
    own: &Container,
    facts: &PodFacts,
    selector: &ResourceFieldSelector,
) -> Result<String, String> {
    let spec = pod.spec.as_ref().ok_or("the pod has no spec")?;
    let container = match selector.container_name.as_deref() {
        None | Some("") => own,
        Some(name) => spec
            .containers
            .iter()
            .chain(spec.init_containers.iter().flatten())
            .find(|c| c.name == name)
            .ok_or_else(|| format!("container {name} not found"))?,
    };
    let (kind, name) = selector
        .resource
        .split_once('.')
        .ok_or_else(|| format!("unsupported container resource: {}", selector.resource))?;
    let resources = container.resources.as_ref();
    let map = match kind {
        "limits" => resources.and_then(|r| r.limits.as_ref()),
        "requests" => resources.and_then(|r| r.requests.as_ref()),
        _ => return Err(format!("unsupported container resource: {}", selector.resource)),
    };
    let given = map
        .and_then(|map| map.get(name))
        .and_then(|quantity| quantity_milli(&quantity.0));
    let milli = match (given, kind, name) {
        (Some(value), _, _) => value,
        (None, "limits", "cpu") => u128::from(facts.cpus) * 1000,
        (None, "limits", "memory") => u128::from(facts.memory) * 1000,
        _ => 0,
    };
    let divisor = selector
        .divisor
        .as_ref()
        .and_then(|d| quantity_milli(&d.0))
        .filter(|d| *d > 0)
        .unwrap_or(1000);
    Ok(milli.div_ceil(divisor).to_string())
}

/// A Kubernetes quantity in thousandths: `100m`, `2`, `1.5`, `128Mi`, `1e3`.
pub(crate) fn quantity_milli(text: &str) -> Option<u128> {
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let factor: u128 = match suffix {
        "m" => 1,
        "" => 1_000,
        "k" => 1_000_000,
        "M" => 1_000_000_000,
        "G" => 1_000_000_000_000,
        "T" => 1_000_000_000_000_000,
        "Ki" => 1_000 << 10,
        "Mi" => 1_000 << 20,
        "Gi" => 1_000 << 30,
        "Ti" => 1_000 << 40,
        other => {
            let exponent: u32 = other.strip_prefix(['e', 'E'])?.parse().ok().filter(|e| *e <= 18)?;
            1_000 * 10u128.pow(exponent)
        }
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let mut value = whole.checked_mul(factor)?;
    if !fraction.is_empty() {
        let digits = fraction.get(..fraction.len().min(18))?;
        value += digits.parse::<u128>().ok()?.checked_mul(factor)? / 10u128.pow(u32::try_from(digits.len()).ok()?);
    }
    Some(value)
}

/// `$(NAME)` references, with `$$(NAME)` as the escape; unknown names stay as they are.
pub(crate) fn expand(text: &str, env: &[(String, String)]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix("$$") {
            out.push('$');
            rest = after;
            continue;
        }
        let reference = rest.strip_prefix("$(").and_then(|r| r.split_once(')'));
        match reference.and_then(|(name, after)| {
            env.iter()
                .rev()
                .find(|(n, _)| n == name)
                .map(|(_, value)| (value, after))
        }) {
            Some((value, after)) => {
                out.push_str(value);
                rest = after;
            }
            None => {
                out.push('$');
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_writes_them() {
        for (text, milli) in [
            ("100m", 100),
            ("2", 2_000),
            ("1.5", 1_500),
            ("128Mi", 134_217_728_000),
            ("1e3", 1_000_000),
            (".5", 500),
            ("1G", 1_000_000_000_000),
        ] {
            assert_eq!(quantity_milli(text), Some(milli), "{text}");
        }
        for text in ["1Q", "x", "1e99"] {
            assert_eq!(quantity_milli(text), None, "{text}");
        }
    }

    #[test]
    fn references_are_expanded_and_escaped() {
        let env = [("A".to_owned(), "1".to_owned()), ("B".to_owned(), "x y".to_owned())];
        assert_eq!(expand("$(A)-$(B)-$(C)-$$(A)-$A-$", &env), "1-x y-$(C)-$(A)-$A-$");
    }
}
