'use strict';
// The routes of an Express server, on Node alone: GET of any path is the HTTP function, POST /invoke the event function.

const http = require('http');

const PORT = 9000;
const HOST = '0.0.0.0';

const server = http.createServer((req, res) => {
  let kind = '';
  if (req.method === 'GET' || req.method === 'HEAD') kind = 'http';
  else if (req.method === 'POST' && req.url === '/invoke') kind = 'event';
  req.resume();
  req.on('end', () => {
    if (!kind) {
      res.writeHead(404, { 'content-type': 'text/plain' });
      return res.end(`Cannot ${req.method} ${req.url}\n`);
    }
    const body = `Hello FunctionCompute, ${kind} function, runtime is : Node ${process.version}\n`;
    res.writeHead(200, { 'content-type': 'text/html; charset=utf-8', 'content-length': Buffer.byteLength(body) });
    return res.end(body);
  });
});

server.timeout = 0; // no limit on a connection's rest
server.keepAliveTimeout = 0;
server.listen(PORT, HOST);
console.log(`Running on http://${HOST}:${PORT}`);
