package server

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/dormouse-sandbox/dormouse/control/store"
	"github.com/dormouse-sandbox/dormouse/sandbox"
)

// meters are the figures at /metrics.
type meters struct {
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	underWay prometheus.Gauge
	creates  *prometheus.CounterVec
	boot     prometheus.Histogram
	ended    *prometheus.CounterVec
	changes  *prometheus.CounterVec
	changing *prometheus.HistogramVec
	streams  prometheus.Gauge
}

func newMeters(reg *prometheus.Registry, db *store.DB) (*meters, error) {
	buckets := []float64{.001, .005, .02, .1, .5, 2, 10, 60, 300}
	m := &meters{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dormouse_http_requests_total", Help: "Requests answered, by route and status.",
		}, []string{"route", "status"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "dormouse_http_request_seconds", Help: "How long requests took; streams count as 0.", Buckets: buckets,
		}, []string{"route"}),
		underWay: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "dormouse_http_requests_under_way", Help: "Requests being answered now.",
		}),
		creates: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dormouse_creates_total", Help: "Creates that came to an end, by outcome: running or the cause.",
		}, []string{"outcome"}),
		boot: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "dormouse_create_seconds", Help: "From the request to a guest that answers.", Buckets: buckets,
		}),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dormouse_sandboxes_ended_total", Help: "Sandboxes that ended, by cause.",
		}, []string{"cause"}),
		changes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dormouse_changes_total", Help: "Pauses, resumes, forks and snapshots that came to an end, by outcome: done or failed.",
		}, []string{"op", "outcome"}),
		changing: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "dormouse_change_seconds", Help: "How long those took that were done.", Buckets: buckets,
		}, []string{"op"}),
		streams: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "dormouse_exec_streams", Help: "Streams open now: commands, terminals, ports and watches.",
		}),
	}
	var errs []error
	for _, c := range []prometheus.Collector{
		m.requests, m.seconds, m.underWay, m.creates, m.boot, m.ended, m.changes, m.changing, m.streams,
		byState{db},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		errs = append(errs, alreadyIsFine(reg.Register(c)))
	}
	return m, errors.Join(errs...)
}

// change counts one pause, resume, fork or snapshot; took is of one that was done.
func (m *meters) change(op string, err error, took time.Duration) {
	if err != nil {
		m.changes.WithLabelValues(op, "failed").Inc()
		return
	}
	m.changes.WithLabelValues(op, "done").Inc()
	m.changing.WithLabelValues(op).Observe(took.Seconds())
}

// alreadyIsFine lets a registry come with the process's own figures in it.
func alreadyIsFine(err error) error {
	var dup prometheus.AlreadyRegisteredError
	if errors.As(err, &dup) {
		return nil
	}
	return err
}

// byState counts the database's rows whenever somebody looks.
type byState struct{ db *store.DB }

var byStateDesc = prometheus.NewDesc("dormouse_sandboxes", "Sandboxes on record, by state.", []string{"state"}, nil)

func (b byState) Describe(ch chan<- *prometheus.Desc) { ch <- byStateDesc }

func (b byState) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	counts, err := b.db.CountByState(ctx)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(byStateDesc, err)
		return
	}
	for _, state := range sandbox.States() {
		ch <- prometheus.MustNewConstMetric(byStateDesc, prometheus.GaugeValue, float64(counts[state]), string(state))
	}
}
