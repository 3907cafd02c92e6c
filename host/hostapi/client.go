package hostapi

import (
	"connectrpc.com/connect"

	"github.com/dormouse-sandbox/dormouse/host/hostapi/gen/dormouse/host/v1/hostv1connect"
)

// NewClient makes a client of a host. Nothing is compressed: output passes
// faster as it is, within a machine and between machines of one site.
func NewClient(http connect.HTTPClient, url string) hostv1connect.HostServiceClient {
	return hostv1connect.NewHostServiceClient(http, url, connect.WithAcceptCompression("gzip", nil, nil))
}
