package server

import (
	"context"

	"github.com/dormouse-sandbox/dormouse/host/hostapi"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// OpenPort carries a connection to a port of a guest.
func (s *server) OpenPort(ctx context.Context, stream *hostapi.PortStream) error {
	first, err := stream.Receive()
	if err != nil {
		return err
	}
	start := first.GetStart()
	if start == nil {
		return hostapi.ToConnect(sandbox.Errorf(sandbox.KindInvalid, "the first message to a port must be start"))
	}
	conn, err := s.agent.OpenPort(ctx, start.GetId(), bounded(start.GetPort()))
	if err != nil {
		return hostapi.ToConnect(err)
	}
	defer func() { _ = conn.Close() }() // what was lost shows in CarryPort
	return hostapi.ToConnect(hostapi.CarryPort(conn.Context(), stream, conn))
}
