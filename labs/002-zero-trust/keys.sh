# Sourced: an issuer of tokens, made of openssl.
#   new_key NAME             makes NAME.pem
#   jwks NAME...             prints the key set of these keys
#   token NAME [SECONDS [KID]]  prints a token that NAME.pem signs, valid for this long (an hour unless told otherwise), said to
#                            be of key KID (NAME unless told otherwise)

b64url() { basenc --base64url -w0 | tr -d =; }

new_key() { openssl genrsa -out "$1.pem" 2048 2>/dev/null; }

jwks() {
  local name keys=()
  for name in "$@"; do
    local n
    n=$(openssl rsa -in "$name.pem" -noout -modulus | cut -d= -f2 | basenc --base16 -d | b64url)
    keys+=("{\"kty\":\"RSA\",\"use\":\"sig\",\"alg\":\"RS256\",\"kid\":\"$name\",\"e\":\"AQAB\",\"n\":\"$n\"}")
  done
  (IFS=,; printf '{"keys":[%s]}\n' "${keys[*]}")
}

token() {
  local now head payload
  now=$(date +%s)
  head=$(printf '{"alg":"RS256","typ":"JWT","kid":"%s"}' "${3:-$1}" | b64url)
  payload=$(printf '{"iss":"issuer@lab.example","sub":"subject@lab.example","iat":%d,"exp":%d}' "$now" $((now + ${2:-3600})) | b64url)
  printf '%s.%s.%s\n' "$head" "$payload" "$(printf '%s' "$head.$payload" | openssl dgst -sha256 -sign "$1.pem" -binary | b64url)"
}
