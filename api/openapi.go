package api

import _ "embed"

//go:embed openapi.json
var openAPI []byte

// OpenAPI is the description of the interface in OpenAPI 3.1, as JSON. It is
// written by hand; tests compare it with the types here and the server's routes.
func OpenAPI() []byte { return openAPI }
