package federation

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"culvert/certs"
	"culvert/federation/state"
	"culvert/federation/store"
)

const (
	maxAnswer      = 64 << 20 // bytes; 3,000 datacenters of ten servers are 12 MB
	maxMessage     = 1 << 10  // bytes of what the far side says of an error
	requestTimeout = 10 * time.Second
	// leaderTimeout is how long the leader that was known last has for an
	// answer. A host that vanished says nothing, and there has to be time left
	// to ask the others who leads now.
	leaderTimeout = requestTimeout / 2
	maxRedirects  = 3
)

var errTooLong = fmt.Errorf("more than %d bytes", maxAnswer)

// ClientOptions configure a [Client].
type ClientOptions struct {
	Primary, Domain string
	// Transport carries requests over mutual TLS. The host of a URL is a server
	// name, server.<dc>.<domain> with a node before it or not, or an address of
	// the primary's own network, with its port.
	Transport http.RoundTripper
	// Direct says that the leader may be dialled at the address that it told:
	// the client is in the primary datacenter.
	Direct bool
}

// A Client asks the primary's sidecars. It is for any number of goroutines.
type Client struct {
	o      ClientOptions
	http   http.Client
	any    string                 // URL of whichever sidecar answers
	leader atomic.Pointer[string] // URL of the leader, as far as is known
}

// NewClient returns a client that has asked nothing yet.
func NewClient(o ClientOptions) *Client {
	return &Client{
		o:   o,
		any: "https://" + certs.ServerName("", o.Primary, o.Domain),
		http: http.Client{
			Transport:     o.Transport,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
}

// Named tells whether an address that a transport is to dial is the name of a
// server, and whose: a URL's host without a port has that of https. Any other
// address is one of the primary's own network.
func Named(address, domain string) (name string, id certs.Identity, ok bool) {
	name, isName := strings.CutSuffix(address, ":443")
	id, err := certs.ParseName(name, domain)
	return name, id, isName && err == nil
}

// An AnswerError is an answer that is no success.
type AnswerError struct {
	Code    int    // of HTTP
	Message string // what the far side said
	Reason  string // of a refusal
}

func (e *AnswerError) Error() string {
	if e.Message == "" {
		return fmt.Sprintf("the primary answered %d %s", e.Code, http.StatusText(e.Code))
	}
	return e.Message
}

// An answer is what came back.
type answer struct {
	code   int
	header http.Header
	body   []byte
}

// send asks one URL. Who gets the response closes its body.
func (c *Client) send(ctx context.Context, method, target string, body any, header http.Header) (*http.Response, error) {
	var content io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("encode request: %w", err)
		}
		content = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, target, content)
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	maps.Copy(req.Header, header)
	resp, err := c.http.Do(req)
	if err != nil {
		if u, ok := errors.AsType[*url.Error](err); ok {
			err = u.Err // the URL is of no help: it names no address
		}
		return nil, fmt.Errorf("ask %s: %w", req.URL.Host, err)
	}
	return resp, nil
}

// do asks one URL. An answer is 200, or also if that is not 0; any other one is
// an error.
func (c *Client) do(ctx context.Context, method, target string, body any, also int) (*answer, error) {
	resp, err := c.send(ctx, method, target, body, nil)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err == nil && len(b) > maxAnswer {
		err = errTooLong
	}
	if err != nil {
		return nil, fmt.Errorf("read answer of %s: %w", resp.Request.URL.Host, err)
	}
	if resp.StatusCode == http.StatusOK || resp.StatusCode == also {
		return &answer{resp.StatusCode, resp.Header, b}, nil
	}
	return nil, answerError(resp.StatusCode, b)
}

// answerError is an answer that is no success, with what its body says.
func answerError(code int, body []byte) *AnswerError {
	var f failure
	_ = json.Unmarshal(body, &f) // some other text is no message of ours
	return &AnswerError{code, bounded(f.Error), bounded(f.Reason)}
}

// bounded keeps a message fit for a line of a log.
func bounded(text string) string {
	if len(text) <= maxMessage {
		return text
	}
	return strings.ToValidUTF8(text[:maxMessage], "") + "..."
}

// write sends a request that only the leader can do, and follows to where it is.
func (c *Client) write(ctx context.Context, method, path string, body any) (*answer, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	base := c.any
	if known := c.leader.Load(); known != nil {
		base = *known
	}
	var last error
	for range maxRedirects {
		a, err := c.try(ctx, method, base, path, body)
		if err != nil && base != c.any && useless(err) && !errors.Is(ctx.Err(), context.Canceled) {
			c.leader.Store(nil) // it may have gone: the others know who follows it
			base, last = c.any, err
			continue
		}
		if err != nil {
			return nil, err
		}
		if a.code != http.StatusTemporaryRedirect {
			return a, nil
		}
		to, err := c.follow(a)
		if err != nil {
			return nil, err
		}
		base = to
		c.leader.Store(&to)
	}
	c.leader.Store(nil)
	if last != nil {
		return nil, fmt.Errorf("reach the leader of the store: %w", last)
	}
	return nil, fmt.Errorf("the primary's sidecars do not agree on a leader, the last one told of is %s", base)
}

// try sends a write to one sidecar. Who is not just anybody has less time.
func (c *Client) try(ctx context.Context, method, base, path string, body any) (*answer, error) {
	if base != c.any {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, leaderTimeout)
		defer cancel()
	}
	return c.do(ctx, method, base+path, body, http.StatusTemporaryRedirect)
}

// useless tells whether an error is none that the leader of a store would give:
// no answer, or one that it can write nothing, as a former leader with a full
// disk says for as long as it is full.
func useless(err error) bool {
	answer, ok := errors.AsType[*AnswerError](err)
	return !ok || answer.Code == http.StatusServiceUnavailable
}

// follow returns where the leader is. It is a server of the primary: no answer
// leads to anybody else.
func (c *Client) follow(a *answer) (string, error) {
	to, err := url.Parse(a.header.Get("Location"))
	if err != nil {
		return "", fmt.Errorf("read where the leader is: %w", err)
	}
	id, err := certs.ParseName(to.Hostname(), c.o.Domain)
	if err != nil || id.Role != certs.RoleServer || id.Datacenter != c.o.Primary || id.Node == "" {
		return "", fmt.Errorf("the leader cannot be %q, which is no server of %s", bounded(to.Hostname()), c.o.Primary)
	}
	if address := a.header.Get(LeaderHeader); c.o.Direct && c.dialable(address) {
		return "https://" + address, nil
	}
	return "https://" + id.Name(c.o.Domain), nil
}

// dialable tells whether an address is one of the own network, and not a name
// that leads to somebody.
func (c *Client) dialable(address string) bool {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil || strings.ContainsAny(host, "/?#@%") {
		return false
	}
	_, err = certs.ParseName(host, c.o.Domain)
	return err != nil
}

// Register puts an entry, or renews it, and returns when that has to be done
// again.
func (c *Client) Register(ctx context.Context, reg state.Registration) (store.Lease, error) {
	var body any = reg.Server
	if reg.Gateway != nil {
		body = reg.Gateway
	}
	a, err := c.write(ctx, http.MethodPut, pathOf(reg.Key()), body)
	if err != nil {
		return store.Lease{}, err
	}
	var l Lease
	if err := json.Unmarshal(a.body, &l); err != nil {
		return store.Lease{}, fmt.Errorf("read lease: %w", err)
	}
	ttl, err := time.ParseDuration(l.TTL)
	if err != nil {
		return store.Lease{}, fmt.Errorf("read lease: %w", err)
	}
	return store.Lease{Index: l.Index, TTL: ttl, Warnings: l.Warnings}, nil
}

// Remove takes an entry away, and keeps the process whose it is from putting it
// back.
func (c *Client) Remove(ctx context.Context, k state.Key) error {
	_, err := c.write(ctx, http.MethodDelete, pathOf(k), nil)
	return err
}

// RemovePeer takes a server out of those that keep the store.
func (c *Client) RemovePeer(ctx context.Context, node string) error {
	_, err := c.write(ctx, http.MethodDelete, "/v1/federation-peers/"+url.PathEscape(node), nil)
	return err
}

func pathOf(k state.Key) string {
	return "/v1/federation-state/" + url.PathEscape(k.Datacenter) + "/" + string(k.Kind) + "/" + url.PathEscape(k.Name)
}

// Greet asks a sidecar of the primary, at an address, what it knows of the store.
func (c *Client) Greet(ctx context.Context, address string) (store.Greeting, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	var g store.Greeting
	a, err := c.do(ctx, http.MethodGet, "https://"+address+"/v1/federation-store", nil, 0)
	if err == nil {
		err = json.Unmarshal(a.body, &g)
	}
	return g, err
}

// Promise asks a sidecar of the primary, at an address, to begin a store with
// others.
func (c *Client) Promise(ctx context.Context, address string, p store.Proposal) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	_, err := c.do(ctx, http.MethodPost, "https://"+address+"/v1/federation-store/promise", p, 0)
	return err
}

// Close ends the connections that nobody uses.
func (c *Client) Close() { c.http.CloseIdleConnections() }
