// A reverse proxy as Go programs have it, which also reads the body and the model: proxy PORT ORIGIN_PORT
package main

import (
	"bytes"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"time"
)

type call struct {
	Model string `json:"model"`
}

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: proxy PORT ORIGIN_PORT")
	}
	origin, err := url.Parse("http://127.0.0.1:" + os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	relay := httputil.NewSingleHostReverseProxy(origin)
	relay.FlushInterval = -1
	relay.ErrorLog = log.New(io.Discard, "", 0)
	relay.Transport = &http.Transport{
		MaxIdleConns:        8192,
		MaxIdleConnsPerHost: 8192,
		IdleConnTimeout:     90 * time.Second,
		DisableCompression:  true,
	}
	serve := func(writer http.ResponseWriter, request *http.Request) {
		if request.Method == http.MethodPost {
			body, err := io.ReadAll(request.Body)
			if err != nil {
				http.Error(writer, "cannot read the body", http.StatusBadRequest)
				return
			}
			var asked call
			if json.Unmarshal(body, &asked) != nil || asked.Model == "" {
				http.Error(writer, "no model", http.StatusBadRequest)
				return
			}
			request.Body = io.NopCloser(bytes.NewReader(body))
			request.ContentLength = int64(len(body))
		}
		relay.ServeHTTP(writer, request)
	}
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Args[1], http.HandlerFunc(serve)))
}
