package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"text/template"
	"time"
)

// callTimeout bounds a call of a server's API. A blocking query lasts as long as
// it was asked to, which is less.
const callTimeout = 70 * time.Second

// An HTTPAPI asks the HTTP API of a server, from its own host.
type HTTPAPI struct {
	host    *Host
	address string
	client  *http.Client
}

// API is the HTTP API on an address of the host.
func (h *Host) API(address string) *HTTPAPI {
	return &HTTPAPI{host: h, address: address, client: &http.Client{
		Timeout: callTimeout,
		Transport: &http.Transport{
			DialContext: func(_ context.Context, network, address string) (net.Conn, error) {
				return h.Dial(network, address)
			},
			DisableKeepAlives: true,
		},
	}}
}

// Call makes a request. The body is sent as JSON unless it is nil or a string,
// and the answer is decoded from JSON unless it is nil or a *string.
func (a *HTTPAPI) Call(method, path string, body, answer any) (http.Header, error) {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	return a.CallContext(ctx, method, path, body, answer)
}

// CallContext is Call that ends with its context.
func (a *HTTPAPI) CallContext(ctx context.Context, method, path string, body, answer any) (http.Header, error) {
	send, err := encode(body)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+a.address+path, bytes.NewReader(send))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := a.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("on %s: %w", a.host.Name, err)
	}
	defer func() { _ = resp.Body.Close() }()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("read the answer to %s %s on %s: %w", method, path, a.host.Name, err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s %s on %s: %s: %s", method, path, a.host.Name, resp.Status, bytes.TrimSpace(got))
	}
	return resp.Header, decode(got, answer)
}

func encode(body any) ([]byte, error) {
	switch body := body.(type) {
	case nil:
		return nil, nil
	case string:
		return []byte(body), nil
	}
	return json.Marshal(body)
}

func decode(got []byte, answer any) error {
	switch answer := answer.(type) {
	case nil:
		return nil
	case *string:
		// A string in JSON, or plain text as it is.
		if json.Unmarshal(got, answer) != nil {
			*answer = string(got)
		}
		return nil
	}
	if err := json.Unmarshal(got, answer); err != nil {
		return fmt.Errorf("decode %q: %w", got, err)
	}
	return nil
}

// render fills in a template of a server's configuration.
func render(t testing.TB, text string, data any) string {
	t.Helper()
	list := func(all []netip.Addr) string {
		var quoted []string
		for _, a := range all {
			quoted = append(quoted, strconv.Quote(a.String()))
		}
		return "[" + strings.Join(quoted, ", ") + "]"
	}
	parsed, err := template.New("configuration").Funcs(template.FuncMap{"list": list}).Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := parsed.Execute(&b, data); err != nil {
		t.Fatal(err)
	}
	return b.String()
}
