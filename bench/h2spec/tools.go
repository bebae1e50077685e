//go:build tools

// Package tools pins h2spec and what it is built from; `bench/get-h2spec` builds it.
package tools

import _ "github.com/summerwind/h2spec/cmd/h2spec"
