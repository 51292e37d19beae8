/** The status drawn as sections, one a stage, each a list of rows. */
import { VDomRenderer } from '@jupyterlab/ui-components';
import * as React from 'react';

import { StatusModel } from './model';
import {
  IAlert,
  IData,
  IDeployment,
  IModel,
  IRun,
  IStatus
} from './status';

type Tone = 'good' | 'warn' | 'bad' | 'plain';

/** A mark beside the word, so that no meaning rests on colour alone. */
const MARKS: { [tone in Tone]: string } = {
  good: '✓',
  warn: '!',
  bad: '✕',
  plain: ''
};

/** The tone of a status word; a word that is not listed stays plain. */
const TONES: { [word: string]: Tone } = {
  champion: 'good',
  passed: 'good',
  running: 'good',
  stopped: 'warn',
  warning: 'warn',
  critical: 'bad',
  damaged: 'bad',
  died: 'bad',
  failed: 'bad',
  interrupted: 'bad',
  'not answering': 'bad'
};

export class StatusView extends VDomRenderer<StatusModel> {
  constructor(model: StatusModel) {
    super(model);
    this.addClass('jp-mlops-View');
    this.node.setAttribute('tabindex', '0'); // a long list scrolls by keyboard
    this.node.setAttribute('role', 'region');
    this.node.setAttribute('aria-label', 'Status of the project');
  }

  protected render(): JSX.Element {
    const { state, updated, busy } = this.model;
    this.node.setAttribute('aria-busy', String(busy));
    switch (state.kind) {
      case 'loading':
        return <p className="jp-mlops-Note">Reading the project…</p>;
      case 'empty':
        return <NoProjectYet folder={this.model.folder} message={state.message} />;
      case 'error':
        return (
          <div className="jp-mlops-Message jp-mlops-mod-bad" role="alert">
            <h2>The status cannot be shown</h2>
            <p>{inCode(state.message)}</p>
          </div>
        );
      case 'ready':
        return <Project status={state.status} updated={updated} />;
    }
  }
}

function NoProjectYet(props: { folder: string; message: string }) {
  return (
    <div className="jp-mlops-Message" role="status">
      <h2>No project here yet</h2>
      <p>
        Run <code>mlops init</code> in a terminal
        {props.folder ? (
          <>
            {' '}
            in the folder <code>{props.folder}</code>
          </>
        ) : null}
        , or <code>%mlops init</code> in a notebook. Then refresh.
      </p>
      {props.message ? <p className="jp-mlops-Note">{inCode(props.message)}</p> : null}
    </div>
  );
}

function Project(props: { status: IStatus; updated: Date | null }) {
  const { project, data, models, runs, deployments, alerts } = props.status;
  return (
    <>
      <header className="jp-mlops-Project">
        <h2 title={project.folder}>{project.name}</h2>
        <p className="jp-mlops-Note" role="status">
          {props.updated ? `as of ${props.updated.toLocaleTimeString()}` : ''}
        </p>
      </header>
      <Stage title="Alerts" rows={alerts.map(alertRow)} none="No alerts." />
      <Stage title="Data" rows={data.map(dataRow)} none="No data set saved yet: `mlops save`." />
      <Stage title="Models" rows={models.map(modelRow)} none="No model registered yet: `mlops register`." />
      <Stage title="Runs" rows={runs.map(runRow)} none="No run yet: `mlops run`." />
      <Stage title="Deployments" rows={deployments.map(deploymentRow)} none="Nothing deployed yet: `mlops deploy`." />
    </>
  );
}

interface IRow {
  key: string;
  /** the first line: what it is */
  title: string;
  /** the badges behind it */
  badges: { text: string; tone: Tone }[];
  /** the second line: what there is to know */
  detail: string;
  /** a longer text for the pointer */
  hint?: string;
}

function Stage(props: { title: string; rows: IRow[]; none: string }) {
  const { title, rows, none } = props;
  return (
    <details className="jp-mlops-Stage" open data-stage={title.toLowerCase()}>
      <summary>
        <h3>{title}</h3>{' '}
        <span className="jp-mlops-Count">{rows.length}</span>
      </summary>
      {rows.length === 0 ? (
        <p className="jp-mlops-Note">{inCode(none)}</p>
      ) : (
        <ul>
          {rows.map(row => (
            <li key={row.key} title={row.hint}>
              <div className="jp-mlops-Line">
                <span className="jp-mlops-Name">{row.title}</span>
                {row.badges.map(badge => (
                  <Badge key={badge.text} {...badge} />
                ))}
              </div>
              {row.detail ? <div className="jp-mlops-Detail">{row.detail}</div> : null}
            </li>
          ))}
        </ul>
      )}
    </details>
  );
}

function Badge(props: { text: string; tone: Tone }) {
  const mark = MARKS[props.tone];
  return (
    <span className={`jp-mlops-Badge jp-mlops-mod-${props.tone}`}>
      {mark ? <span aria-hidden="true">{mark} </span> : null}
      {props.text}
    </span>
  );
}

function dataRow(data: IData): IRow {
  return {
    key: data.name,
    title: data.name,
    badges: [{ text: `@${data.version}`, tone: 'plain' }],
    detail: joined(size(data), ago(data.saved_at), data.message),
    hint: data.message ?? undefined
  };
}

function modelRow(model: IModel): IRow {
  const aliases = Object.entries(model.aliases ?? {});
  return {
    key: model.name,
    title: model.name,
    badges: aliases.map(([alias, version]) => ({
      text: `${alias} @${version}`,
      tone: tone(alias)
    })),
    detail: joined(`latest @${model.version}`, model.run && `run ${model.run.slice(0, 8)}`),
    hint: model.run ? `run ${model.run}` : undefined
  };
}

function runRow(run: IRun): IRow {
  return {
    key: run.id,
    title: run.pipeline,
    badges: [{ text: run.status, tone: run.status === 'running' ? 'plain' : tone(run.status) }],
    detail: joined(ago(run.started_at), duration(run.seconds)),
    hint: run.id
  };
}

function deploymentRow(deployment: IDeployment): IRow {
  return {
    key: deployment.name,
    title: deployment.name,
    badges: [{ text: deployment.state, tone: tone(deployment.state) }],
    detail: joined(deployment.model, deployment.url)
  };
}

function alertRow(alert: IAlert, index: number): IRow {
  return {
    key: `${index}-${alert.at}`,
    title: alert.message,
    badges: [{ text: alert.severity, tone: tone(alert.severity) }],
    detail: ago(alert.at)
  };
}

function tone(word: string): Tone {
  return TONES[word] ?? 'plain';
}

function joined(...parts: (string | null | undefined)[]): string {
  return parts.filter(Boolean).join(' · ');
}

function size(data: IData): string {
  const rows = data.rows === null ? '' : `${data.rows.toLocaleString()} rows`;
  return data.columns === null ? rows : joined(rows, `${data.columns} columns`);
}

/** `2026-11-23T07:00:00Z` → `5 minutes ago`; a text that is no date stays as it is. */
function ago(at: string | null): string {
  if (!at) {
    return '';
  }
  const seconds = (Date.parse(at) - Date.now()) / 1000;
  if (Number.isNaN(seconds)) {
    return at;
  }
  const format = new Intl.RelativeTimeFormat(undefined, { numeric: 'auto' });
  for (const [unit, length] of UNITS) {
    if (Math.abs(seconds) >= length) {
      return format.format(Math.trunc(seconds / length), unit);
    }
  }
  return format.format(0, 'second');
}

const UNITS: [Intl.RelativeTimeFormatUnit, number][] = [
  ['year', 31536000],
  ['month', 2592000],
  ['day', 86400],
  ['hour', 3600],
  ['minute', 60]
];

/** Seconds with their unit and three significant digits. */
function duration(seconds: number | null): string {
  if (seconds === null || seconds === undefined) {
    return '';
  }
  return seconds < 120
    ? `${Number(seconds.toPrecision(3))} s`
    : `${Number((seconds / 60).toPrecision(3))} min`;
}

/** Text between back quotes becomes code. */
function inCode(text: string): React.ReactNode[] {
  return text
    .split('`')
    .map((part, index) => (index % 2 ? <code key={index}>{part}</code> : part));
}
