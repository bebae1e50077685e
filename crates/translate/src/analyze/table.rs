//! Every message that analysis knows: number, weight, name, meaning, and what to do about it.
//!
//! `IST…` numbers, names and weights are Istio's, for messages of the same meaning; `MNT…` are our own. `docs/messages.md` is this table
//! ([`markdown`]); a test fails when they differ.

use mantlet_api::diagnostic::Severity;

/// A kind of message.
#[derive(Debug, PartialEq, Eq)]
pub struct Message {
    /// `IST0101`, `MNT0101`.
    pub code: &'static str,
    /// Its weight.
    pub level: Severity,
    /// CamelCase name.
    pub name: &'static str,
    /// Whether it is about security.
    pub security: bool,
    /// What was found, in general.
    pub meaning: &'static str,
    /// Why it matters and what to do.
    pub advice: &'static str,
}

macro_rules! messages {
    ($($(#[$s:ident])? $ident:ident = $code:literal $level:ident $name:literal: $meaning:literal, $advice:literal;)*) => {
        $(
            #[doc = $meaning]
            pub const $ident: Message = Message {
                code: $code,
                level: Severity::$level,
                name: $name,
                security: messages!(@$($s)?),
                meaning: $meaning,
                advice: $advice,
            };
        )*
        /// All of them, by number.
        pub const ALL: &[&Message] = &[$(&$ident),*];
    };
    (@security) => { true };
    (@) => { false };
}

messages! {
    INTERNAL_ERROR = "IST0001" Error "InternalError": "The analysis itself failed.",
        "Part of the cluster could not be read, so this answer is incomplete. The message says which request failed and why.";
    DEPRECATED = "IST0002" Warning "Deprecated": "A feature or kind that is used is deprecated.",
        "It still works here through conversion, but not with current Istio. `mantlet migrate -f FILE` writes the modern equivalent and says what cannot be kept.";
    #[security] REFERENCED_RESOURCE_NOT_FOUND = "IST0101" Error "ReferencedResourceNotFound": "An object names another one that does not exist.",
        "Correct the name (and namespace), or create what is missing. A namespace that does not exist in an AuthorizationPolicy never matches; a missing credential closes the gateway's port; a missing provider denies.";
    #[security] NAMESPACE_NOT_INJECTED = "IST0102" Info "NamespaceNotInjected": "A namespace is not enabled for sidecar injection.",
        "Pods there have no proxy: they send plaintext, have no identity and no policy protects them. Label the namespace and restart its workloads, or label it `istio-injection=disabled` to say that this is meant.";
    #[security] POD_MISSING_PROXY = "IST0103" Warning "PodMissingProxy": "A pod in an injected namespace has no proxy.",
        "It was created before the namespace was labelled, or injection failed. Restart the workload: `kubectl rollout restart deployment NAME`.";
    #[security] SCHEMA_VALIDATION_ERROR = "IST0106" Error "SchemaValidationError": "The object breaks a rule of its kind.",
        "The API server would refuse it. The message names the field and the rule; `mantlet validate -f FILE` shows line and column.";
    MISPLACED_ANNOTATION = "IST0107" Warning "MisplacedAnnotation": "An Istio annotation stands on a kind that does not read it.",
        "Move it to one of the kinds that the message names; annotations for pods belong into the pod template, not onto the Deployment.";
    UNKNOWN_ANNOTATION = "IST0108" Warning "UnknownAnnotation": "An annotation of Istio's names is not known.",
        "It has no effect. Check its spelling.";
    CONFLICTING_MESH_GATEWAY_HOSTS = "IST0109" Error "ConflictingMeshGatewayVirtualServiceHosts": "Two VirtualServices of the mesh route the same host.",
        "Only one of them is used, and which one depends on their age. Merge them.";
    CONFLICTING_SIDECAR_SELECTORS = "IST0110" Error "ConflictingSidecarWorkloadSelectors": "Two Sidecars select the same pod.",
        "Make the selectors exclusive.";
    MULTIPLE_SIDECARS_WITHOUT_SELECTOR = "IST0111" Error "MultipleSidecarsWithoutWorkloadSelectors": "A namespace has several Sidecars without selector.",
        "Keep one, or give the others a selector.";
    DESTINATION_PORT_REQUIRED = "IST0112" Error "VirtualServiceDestinationPortSelectorRequired": "A route goes to a service with several ports and does not name one.",
        "Write `port: {number: …}` into the destination.";
    DEPLOYMENT_PROTOCOLS = "IST0116" Warning "DeploymentAssociatedToMultipleServices": "Two services declare different protocols for the same port of a workload.",
        "The proxy can treat a port in one way only, so one of the declarations is wrong. Policies on HTTP fields depend on it.";
    PORT_NAME_CONVENTION = "IST0118" Info "PortNameIsNotUnderNamingConvention": "A Service port does not declare its protocol.",
        "The proxy inspects the first bytes. Name the port `http`, `grpc-…`, `tcp-…` or set `appProtocol`, so that policies on HTTP fields cannot be confused by what a client sends.";
    #[security] MULTIPLE_INJECTION_LABELS = "IST0123" Warning "NamespaceMultipleInjectionLabels": "A namespace has both `istio-injection` and `istio.io/rev`.",
        "`istio-injection` wins and the revision is ignored, so pods may get the proxy of another control plane, or none. Remove one of the labels.";
    #[security] INVALID_ANNOTATION = "IST0125" Warning "InvalidAnnotation": "An annotation has a value that is not allowed.",
        "The injector refuses pods with it. The message says what is allowed.";
    UNKNOWN_MESH_NETWORKS_REGISTRY = "IST0126" Error "UnknownMeshNetworksServiceRegistry": "MeshNetworks names a registry that is not known.",
        "Name `Kubernetes` or the cluster's id.";
    #[security] NO_MATCHING_WORKLOADS = "IST0127" Warning "NoMatchingWorkloadsFound": "A policy selects no workload of the mesh.",
        "It protects nothing. Compare its labels with `kubectl get pods --show-labels`; a policy acts in its own namespace only (in the root namespace: everywhere).";
    #[security] NO_SERVER_VERIFICATION = "IST0128" Warning "NoServerCertificateVerificationDestinationLevel": "A DestinationRule starts TLS without checking the server's certificate.",
        "Anybody in the path can answer. Set `caCertificates` (and `subjectAltNames`).";
    #[security] NO_SERVER_VERIFICATION_PORT = "IST0129" Warning "NoServerCertificateVerificationPortLevel": "The same, in the settings of one port.",
        "Anybody in the path can answer. Set `caCertificates` (and `subjectAltNames`) at the port.";
    UNREACHABLE_RULE = "IST0130" Warning "VirtualServiceUnreachableRule": "A route can never be used, because an earlier one takes all its requests.",
        "Put the more specific route first.";
    INEFFECTIVE_MATCH = "IST0131" Info "VirtualServiceIneffectiveMatch": "A match repeats one of an earlier route.",
        "Remove it, or put the route first.";
    HOST_NOT_IN_GATEWAY = "IST0132" Warning "VirtualServiceHostNotFoundInGateway": "A VirtualService is bound to a gateway that does not serve its host.",
        "Add the host to a server of the Gateway, or correct it; until then the gateway answers 404.";
    #[security] SCHEMA_WARNING = "IST0133" Warning "SchemaWarning": "The object is accepted, but a rule of its kind advises against it.",
        "Read the message: among these is the DENY policy with HTTP fields that denies all TCP traffic.";
    SERVICE_ENTRY_ADDRESSES = "IST0134" Warning "ServiceEntryAddressesRequired": "A ServiceEntry with TCP ports has no addresses.",
        "Without addresses a client's connections cannot be told apart by host; set `addresses`.";
    DEPRECATED_ANNOTATION = "IST0135" Info "DeprecatedAnnotation": "An annotation is deprecated.",
        "The message names its replacement, if there is one.";
    ALPHA_ANNOTATION = "IST0136" Info "AlphaAnnotation": "An annotation belongs to an alpha feature.",
        "Expect it to change.";
    DEPLOYMENT_CONFLICTING_PORTS = "IST0137" Warning "DeploymentConflictingPorts": "Two services reach the same port of a workload by different port numbers.",
        "Use the same number in both.";
    #[security] DUPLICATE_CERTIFICATE = "IST0138" Warning "GatewayDuplicateCertificate": "Several Gateways on the same pods use the same certificate.",
        "Browsers reuse a connection for every name in its certificate, so a request may reach the wrong server's routes (404) and policies. Use one Gateway with all hosts, or one certificate per host.";
    #[security] INVALID_WEBHOOK = "IST0139" Error "InvalidWebhook": "An Istio webhook points to a service that does not exist, or overlaps with another one.",
        "Pods are not injected, are injected twice, or cannot be created; configuration is not validated. Reinstall with `istioctl install`, or remove the stale object.";
    INGRESS_SUBSET = "IST0140" Warning "IngressRouteRulesNotAffected": "Rules for a subset have no effect on requests from a gateway.",
        "Bind the VirtualService with the subset to the gateway as well.";
    #[security] LOCALHOST_LISTENER = "IST0143" Error "LocalhostListener": "An application listens on localhost only, on a port that a Service exposes.",
        "The proxy forwards to the pod's address, so nobody answers. Let the application listen on 0.0.0.0 or ::.";
    #[security] APPLICATION_UID = "IST0144" Warning "InvalidApplicationUID": "An application runs as user 1337.",
        "That is the proxy's user: its traffic is not captured, so it is neither encrypted nor authorised. Use another `runAsUser`.";
    CONFLICTING_GATEWAYS = "IST0145" Error "ConflictingGateways": "Two Gateways serve the same host on the same port of the same pods.",
        "Merge them or make the hosts different; only the older one is used.";
    IMAGE_AUTO_WARNING = "IST0146" Warning "ImageAutoWithoutInjectionWarning": "A Deployment has `image: auto` but is not injected.",
        "Its pods will not start. Label its namespace, or its pod template with `sidecar.istio.io/inject: \"true\"`.";
    #[security] IMAGE_AUTO_ERROR = "IST0147" Error "ImageAutoWithoutInjectionError": "A pod has `image: auto` but is not injected.",
        "It cannot start. Label its namespace, or the pod with `sidecar.istio.io/inject: \"true\"`.";
    NAMESPACE_INJECTED_BY_DEFAULT = "IST0148" Info "NamespaceInjectionEnabledByDefault": "A namespace is injected although it has no label.",
        "The installation injects everywhere by default. Label the namespace to say what is meant.";
    #[security] CLAIM_ROUTING_WITHOUT_AUTHN = "IST0149" Error "JwtClaimBasedRoutingWithoutRequestAuthN": "Routes depend on token claims, but no RequestAuthentication verifies tokens at the gateway.",
        "Without verification there are no claims and the route never matches. Apply a RequestAuthentication to the gateway's pods first.";
    EXTERNAL_NAME_PORT = "IST0150" Warning "ExternalNameServiceTypeInvalidPortName": "An ExternalName Service has ports that are not declared as HTTP or TLS.",
        "TCP ports of such services can take traffic meant for others. Name the port for its protocol.";
    FILTER_RELATIVE = "IST0151" Warning "EnvoyFilterUsesRelativeOperation": "An EnvoyFilter patches relative to something that may not be there.",
        "EnvoyFilter has no effect on Mantlet's own proxies. Prefer INSERT_FIRST or set `priority` for Envoy.";
    FILTER_REPLACE = "IST0152" Error "EnvoyFilterUsesReplaceOperationIncorrectly": "REPLACE is used where it does not apply.",
        "It works for HTTP_FILTER and NETWORK_FILTER only.";
    FILTER_ADD = "IST0153" Error "EnvoyFilterUsesAddOperationIncorrectly": "ADD is used where it is ignored.",
        "It is ignored for ROUTE_CONFIGURATION and HTTP_ROUTE.";
    FILTER_REMOVE = "IST0154" Error "EnvoyFilterUsesRemoveOperationIncorrectly": "REMOVE is used where it is ignored.",
        "It is ignored for ROUTE_CONFIGURATION and HTTP_ROUTE.";
    FILTER_RELATIVE_VERSION = "IST0155" Warning "EnvoyFilterUsesRelativeOperationWithProxyVersion": "An EnvoyFilter for one proxy version patches relative to something that may not be there.",
        "During an upgrade it may not apply. Set `priority`.";
    TELEMETRY_PROVIDER = "IST0157" Warning "InvalidTelemetryProvider": "A Telemetry names no provider.",
        "That part of it is ignored unless the mesh has default providers.";
    #[security] PROXY_IMAGE_MISMATCH = "IST0158" Warning "PodsIstioProxyImageMismatchInNamespace": "Pods run an older proxy than the injector would give them.",
        "They lack fixes of the new release. Restart the workloads.";
    CONFLICTING_TELEMETRY_SELECTORS = "IST0159" Error "ConflictingTelemetryWorkloadSelectors": "Two Telemetries select the same pod.",
        "Make the selectors exclusive.";
    MULTIPLE_TELEMETRIES_WITHOUT_SELECTOR = "IST0160" Error "MultipleTelemetriesWithoutWorkloadSelectors": "A namespace has several Telemetries without selector.",
        "Keep one, or give the others a selector.";
    #[security] INVALID_GATEWAY_CREDENTIAL = "IST0161" Error "InvalidGatewayCredential": "The secret of a Gateway holds no usable certificate and key.",
        "The port stays closed. Create it anew: `kubectl create secret tls NAME --cert=… --key=…`, in the namespace of the gateway's pods.";
    GATEWAY_PORT_NOT_ON_SERVICE = "IST0162" Warning "GatewayPortNotDefinedOnService": "A Gateway's port is not a port of the gateway's Service.",
        "Clients cannot reach it through the Service. Add the port there.";
    REFERENCED_INTERNAL_GATEWAY = "IST0165" Warning "ReferencedInternalGateway": "A VirtualService names a Gateway that was generated.",
        "Bind it to the object that the generated one comes from.";
    #[security] INEFFECTIVE_SELECTOR = "IST0166" Warning "IneffectiveSelector": "A policy selects pods of a Kubernetes Gateway by label.",
        "Use `targetRefs`; the selector has no effect there.";
    #[security] INEFFECTIVE_POLICY = "IST0167" Warning "IneffectivePolicy": "A policy has no effect.",
        "The message says why.";
    SUBSET_SELECTS_NO_PODS = "IST0173" Error "DestinationRuleSubsetNotSelectPods": "A subset selects no pod.",
        "Requests for it fail with 503. Compare its labels with the pods'.";
    #[security] UNKNOWN_DESTINATION_RULE_HOST = "IST0174" Warning "UnknownDestinationRuleHost": "A DestinationRule names a host that no service has.",
        "Nothing of it is used, TLS settings included. Short names stand for services of the rule's own namespace: write the full name.";
    #[security] JWKS_FETCH_UNRESTRICTED = "IST0175" Warning "JwksUriFetchUnrestricted": "The control plane may fetch key sets from internal addresses.",
        "Whoever may write a RequestAuthentication can make it send requests there. Set `BLOCKED_CIDRS_IN_JWKS_URIS` on istiod.";
    CONFLICTING_ENTRY_PROTOCOL = "IST0177" Warning "ConflictingServiceEntryProtocol": "Two ServiceEntries declare different protocols for the same host and port.",
        "Use the same protocol in both.";

    #[security] UNKNOWN_FIELD = "MNT0001" Error "UnknownField": "A field does not exist in its kind.",
        "The API server drops it, so the object means less than what is written: a misspelt `selector` selects everything. The message names the nearest field.";
    DECODE = "MNT0002" Error "Undecodable": "A value has the wrong type or is not one of the allowed ones.",
        "The message names the field and what is allowed there.";
    UNKNOWN_KIND = "MNT0003" Error "UnknownKind": "The kind or its version is not known.",
        "Correct apiVersion and kind; `kubectl api-resources` lists them.";
    INVALID_NAME = "MNT0004" Error "InvalidName": "A name or namespace is not one that Kubernetes takes.",
        "Names are lower case letters, digits and `-` (and `.` where the kind allows it). The message names the nearest good one.";
    SYNTAX = "MNT0005" Error "Syntax": "The text is no YAML.",
        "The message names line and column. Indentation and quotes that a web page or a word processor has changed are the usual cause; `mantlet validate --fix` repairs what is safe to repair.";
    TYPOGRAPHIC_QUOTES = "MNT0006" Error "TypographicQuotes": "A value stands between typographic quotes, which are part of it.",
        "Replace them by plain quotes; `mantlet validate --fix` does it.";
    INDENTATION = "MNT0007" Error "LostIndentation": "A text lost its indentation, as when it is copied from a web page.",
        "`mantlet validate` shows how the lines belong together by their names, if there is only one way; `mantlet validate --fix` writes it.";

    #[security] NOT_IN_FORCE = "MNT0100" Warning "NotInForceAsWritten": "Part of an object is not translated as written.",
        "The message says what happens instead; for policies that is always the closed direction. It also stands in the object's status.";
    #[security] PRINCIPAL_WITH_SCHEME = "MNT0101" Error "PrincipalWithScheme": "A principal is written with `spiffe://`.",
        "Principals are written without the scheme, so this value never matches. Write `cluster.local/ns/NAMESPACE/sa/ACCOUNT`.";
    #[security] LITERAL_WILDCARD = "MNT0102" Error "LiteralWildcard": "A `*` stands where it is no wildcard.",
        "A wildcard is the whole value, its first or its last character, and only one of these; elsewhere `*` is compared literally, so the value practically never matches. No single value says \"contains\": for paths combine a suffix `*/x`, a prefix `/x*` and a template such as `/{*}/x/{**}`.";
    #[security] RULE_NEVER_MATCHES = "MNT0103" Warning "RuleNeverMatches": "A rule's conditions contradict each other.",
        "No request meets all of them. An ALLOW rule that never matches admits nothing; a DENY rule that never matches protects nothing.";
    #[security] IDENTITY_WITHOUT_STRICT = "MNT0104" Warning "IdentityWithoutMutualTls": "A rule asks for the caller's identity on a workload that accepts no mutual TLS.",
        "Plaintext callers have no identity: with mode DISABLE the condition never holds. Set mode STRICT (or PERMISSIVE) in a PeerAuthentication.";
    #[security] NEGATIVE_IDENTITY = "MNT0105" Warning "NegativeIdentityAdmitsPlaintext": "An ALLOW rule only says who may not call.",
        "`notPrincipals`, `notNamespaces` and the like also hold for callers without identity, so this rule admits plaintext and callers without token. Add what the caller must be, or `principals: [\"*\"]`, or set mode STRICT.";
    #[security] HTTP_FIELDS_ON_TCP = "MNT0106" Warning "HttpFieldsOnTcpPort": "A policy with HTTP fields applies to a port that is declared TCP.",
        "There an ALLOW rule never matches, and a DENY rule denies every connection. Name the port for its protocol, or limit the rule with `ports`.";
    #[security] UNNORMALISED_PATH = "MNT0107" Error "UnnormalisedPath": "A path in a rule can never be equal to a normalised request path.",
        "Paths are compared after normalisation and without query: no `//`, `/./`, `/../`, `%2F`-like escapes of unreserved characters, `?` or `#`. Write it as the proxy sees it, beginning with `/`.";
    #[security] TRAILING_SLASH = "MNT0108" Warning "DenyMissesTrailingSlash": "A DENY rule names an exact path but not the same path with a slash at its end.",
        "Most servers treat `/admin` and `/admin/` alike, the policy does not. Deny both, and what is below: `/admin`, `/admin/*`.";
    #[security] HOST_WITHOUT_PORT = "MNT0109" Warning "DenyMissesHostWithPort": "A DENY rule names a host without the form that carries a port.",
        "Clients may send `host:port`, which is another value. Deny `host` and `host:*`.";
    #[security] MALFORMED_IDENTITY = "MNT0110" Error "MalformedIdentity": "A principal, namespace or service account cannot exist in this form.",
        "Principals are `TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT`; namespaces and accounts are Kubernetes names. Regular expressions are not supported anywhere.";
    #[security] SELECTOR_ON_CLIENT = "MNT0111" Warning "SelectorOnClient": "A policy selects the workload that it names as the caller.",
        "Policies act where requests arrive: the selector must name the server, `from` the client.";
    #[security] TOKEN_NOT_REQUIRED = "MNT0112" Warning "TokenNotRequired": "A workload verifies tokens, but nothing requires one.",
        "RequestAuthentication refuses bad tokens and lets requests without a token pass. Require one with an AuthorizationPolicy: `requestPrincipals: [\"*\"]` in an ALLOW rule, or `notRequestPrincipals: [\"*\"]` in a DENY rule.";
    #[security] TOKEN_NOT_VERIFIED = "MNT0113" Warning "TokenNotVerified": "A rule asks for token claims on a workload that verifies no tokens.",
        "Without a RequestAuthentication there are no claims: ALLOW rules never match, and `notRequestPrincipals` always holds.";
    #[security] ANY_ISSUER = "MNT0114" Warning "AnyIssuer": "A rule accepts the tokens of any of several issuers.",
        "`requestPrincipals: [\"*\"]` takes a token of every issuer that the workload knows. Name the issuer: `https://issuer.example/*`.";
    #[security] JWKS_INTERNAL = "MNT0115" Warning "JwksUriInternal": "A key set is fetched from a private, local or link-local address.",
        "The control plane fetches it with its own network access. Use a public name, a Service of the mesh, or `jwks` inline.";
    #[security] JWKS_PLAINTEXT = "MNT0116" Warning "JwksUriPlaintext": "A key set is fetched over plain HTTP from outside of the cluster.",
        "Whoever can change the answer can make tokens. Use https.";
    #[security] WRONG_ROOT_NAMESPACE = "MNT0117" Warning "WrongRootNamespace": "A policy seems to be meant for the whole mesh but is not in the root namespace.",
        "Only policies in `meshConfig.rootNamespace` are mesh-wide; elsewhere they act in their own namespace.";
    #[security] ROOT_PEER_SELECTOR = "MNT0118" Error "PeerAuthenticationSelectorInRootNamespace": "A PeerAuthentication with a selector stands in the root namespace.",
        "It selects nothing. Put it into the workload's namespace.";
    #[security] RULE_SHADOWED = "MNT0119" Warning "RuleShadowed": "A rule has no effect, because another one of the same action covers it.",
        "Every request it matches is matched by the other rule as well. Remove it, or make the other one narrower.";
    #[security] ALLOW_DENIED = "MNT0120" Warning "AllowCoveredByDeny": "An ALLOW rule has no effect, because a DENY rule covers it.",
        "DENY is looked at first. Everything this rule allows is denied before.";
    #[security] DUPLICATE_PEER_AUTHENTICATION = "MNT0122" Warning "DuplicatePeerAuthentication": "Several PeerAuthentications of the same level apply, and only the oldest counts.",
        "They are not merged, field by field or otherwise. Keep one.";
    #[security] UNKNOWN_PORT_LEVEL = "MNT0123" Warning "PortLevelMtlsUnknownPort": "portLevelMtls names a port of the Service, not of the workload.",
        "The number must be the container's (the Service's targetPort). As it stands, the entry has no effect.";
    #[security] SERVICE_PORT_IN_RULE = "MNT0124" Warning "RuleNamesServicePort": "`ports` names a port of the Service, not of the workload.",
        "Rules see the port that the container listens on (the Service's targetPort; on gateways the pod's). As it stands, the value never matches.";
    #[security] RULE_BREAKS_STRICT = "MNT0125" Error "DestinationRuleBreaksStrict": "A DestinationRule turns mutual TLS off for a workload that accepts nothing else.",
        "Connections fail: a client's rule beats automatic mutual TLS. Use ISTIO_MUTUAL or remove `tls` from the rule.";
    #[security] RULE_CANCELS_MUTUAL_TLS = "MNT0126" Warning "DestinationRuleCancelsMutualTls": "A DestinationRule without `tls` replaces a wider one that asks for mutual TLS.",
        "The most specific rule counts alone. With `enableAutoMtls: false` its clients send plaintext; add `tls: {mode: ISTIO_MUTUAL}`.";
    #[security] METHOD_CASE = "MNT0135" Warning "MethodCase": "A method in a rule is not in upper case.",
        "Methods are compared exactly, and clients send upper case.";
    #[security] EXCLUDED_PORT = "MNT0141" Warning "ExcludedPortBypassesPolicy": "A pod excludes an inbound port from capture that a Service exposes.",
        "Connections to it bypass the proxy: no mutual TLS, no identity, and no policy decides about them. Remove it from `traffic.sidecar.istio.io/excludeInboundPorts`, or accept it knowingly.";
    #[security] HOST_NETWORK = "MNT0142" Warning "HostNetworkPod": "A pod behind a Service of an injected namespace uses the host's network.",
        "It cannot have a proxy, so no policy protects it.";
    #[security] TARGET_ON_SIDECAR = "MNT0143" Warning "TargetRefsWithoutEffect": "A policy is attached to something that only waypoint proxies serve.",
        "Sidecars ignore policies with `targetRefs`. Use `selector` for them; `targetRefs` of kind Gateway work on gateways.";
    #[security] SEVERAL_PROVIDERS = "MNT0150" Error "SeveralCustomProviders": "CUSTOM policies with different providers apply to the same workload.",
        "Requests that match their rules are denied unless the control plane runs with PILOT_ENABLE_MULTIPLE_CUSTOM_AUTHZ_PROVIDERS=true. Use one provider per workload.";
}

/// The message with this number.
pub fn find(code: &str) -> Option<&'static Message> {
    ALL.iter().copied().find(|m| m.code.eq_ignore_ascii_case(code))
}

/// The table as the text of `docs/messages.md`.
pub fn markdown() -> String {
    use std::fmt::Write;

    let mut out = String::from(
        "# Messages\n\n\
         What `istioctl analyze` (also `mantlet analyze`) reports. Numbers that begin with `IST` are Istio's and mean the same; those that\n\
         begin with `MNT` are Mantlet's own. **S** marks messages about security. `mantlet analyze --explain CODE` prints one of them.\n\n\
         This page is made from `crates/translate/src/analyze/table.rs`.\n",
    );
    for message in ALL {
        let security = if message.security { ", **S**" } else { "" };
        let _ = write!(
            out,
            "\n## {}\n\n{} ({:?}{security}). {}\n\n{}\n",
            message.code, message.name, message.level, message.meaning, message.advice
        );
    }
    out
}
